/* Whether a file's page is in the page cache, without reading it. */
#include "native.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_cachestat
#define SYS_cachestat 451 /* of every architecture; Linux 6.5 */
#endif

enum { PAGE_OF_CACHE = 4096 };

/* linux/mman.h */
struct cache_range {
	uint64_t offset;
	uint64_t length;
};

struct cache_found {
	uint64_t cached;
	uint64_t dirty, writeback, evicted, recently_evicted;
};

static int by_mapping(int fd, uint64_t offset)
{
	unsigned char resident = 0;
	long size = sysconf(_SC_PAGESIZE);
	off_t start = (off_t)(offset - offset % (uint64_t)size);
	void *page = mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED, fd, start);
	int error;

	if (page == MAP_FAILED)
		return -errno;
	error = mincore(page, (size_t)size, &resident) < 0 ? -errno : 0;
	munmap(page, (size_t)size);
	return error < 0 ? error : resident & 1;
}

int rw_is_cached(int fd, uint64_t offset)
{
	struct cache_range range = { offset, 1 };
	struct cache_found found = { 0 };

	if (offset > INT64_MAX - PAGE_OF_CACHE)
		return -EINVAL;
	/* First, since it needs neither a mapping nor the lock of this process's mappings, which whoever pins or populates
	 * memory holds for long. Whatever is said against it (an older kernel, a filter of system calls, hugetlbfs), the
	 * other way is asked. */
	if (syscall(SYS_cachestat, fd, &range, &found, 0) == 0)
		return found.cached > 0;
	return by_mapping(fd, offset);
}
