/* Whether a file's page is in the page cache, without reading it. */
#include "native.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

int rw_is_cached(int fd, uint64_t offset)
{
	unsigned char resident = 0;
	uint64_t size = (uint64_t)sysconf(_SC_PAGESIZE);
	void *page;
	int error;

	if (offset > INT64_MAX - size)
		return -EINVAL;
	page = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, (off_t)(offset - offset % size));
	if (page == MAP_FAILED)
		return -errno;
	error = mincore(page, size, &resident) < 0 ? -errno : 0;
	munmap(page, size);
	return error < 0 ? error : resident & 1;
}
