/* The fake driver's device memory: files that move into a process's memory and out of it, by way of process_vm_*v. */
#include "fake_cuda.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PIECE = 1 << 16, NVIDIA_MAJOR = 195 };

/* 0 or an errno. */
int move(pid_t pid, uint64_t address, void *data, size_t size, bool write)
{
	for (size_t done = 0; done < size;) {
		struct iovec here = {(char *)data + done, size - done};
		struct iovec there = {(void *)(uintptr_t)(address + done), size - done};
		ssize_t moved = write ? process_vm_writev(pid, &here, 1, &there, 1, 0)
				      : process_vm_readv(pid, &here, 1, &there, 1, 0);

		if (moved <= 0)
			return moved == 0 ? EFAULT : errno;
		done += (size_t)moved;
	}
	return 0;
}

int read_page(pid_t pid, struct page *page)
{
	switch (move(pid, PAGE_ADDRESS, page, sizeof *page, false)) {
	case 0:
		return page->magic == PAGE_MAGIC ? OK : NOT_INITIALIZED;
	case EFAULT:
		return NOT_INITIALIZED;
	case ESRCH:
		return OPERATING_SYSTEM;
	case EPERM:
		return NOT_PERMITTED;
	default:
		return UNKNOWN;
	}
}

int set_word(pid_t pid, size_t offset, uint32_t value)
{
	switch (move(pid, PAGE_ADDRESS + offset, &value, sizeof value, true)) {
	case 0:
		return OK;
	case ESRCH:
		return OPERATING_SYSTEM;
	default:
		return UNKNOWN;
	}
}

void uuid_text(char text[static 64], const unsigned char uuid[static 16])
{
	char *at = text + sprintf(text, "GPU");

	for (int byte = 0; byte < 16; byte++) {
		if (byte == 0 || (byte >= 4 && byte <= 10 && byte % 2 == 0))
			*at++ = '-';
		at += sprintf(at, "%02x", uuid[byte]);
	}
}

static void device_path(char path[static PATH_MAX], const unsigned char uuid[static 16], const char *token)
{
	char name[160], text[64];

	uuid_text(text, uuid);
	snprintf(name, sizeof name, "devices/%s%s%.32s", text, *token == 0 ? "" : "/", token);
	path_of(path, name);
}

/* Copies the process's device memory into its region. */
int device_out(pid_t pid, const struct page *page)
{
	char path[PATH_MAX], piece[PIECE];
	uint64_t done = 0;

	device_path(path, page->uuid, page->token);
	int file = open(path, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		return UNKNOWN;
	for (ssize_t got; (got = read(file, piece, sizeof piece)) > 0; done += (uint64_t)got)
		if (done + (uint64_t)got > page->size || move(pid, page->region + done, piece, (size_t)got, true) != 0)
			break;
	close(file);
	return done == page->size ? OK : UNKNOWN;
}

/* Once the process is checkpointed: who is killed before that has taken nothing. */
int device_gone(const struct page *page)
{
	char path[PATH_MAX];

	device_path(path, page->uuid, page->token);
	return unlink(path) == 0 ? OK : UNKNOWN;
}

/* What the real driver opens when it gives the process a GPU. */
static bool has_node(pid_t pid, unsigned minor_number)
{
	char path[64];
	struct stat status;

	snprintf(path, sizeof path, "/proc/%d/root/dev/nvidia%u", pid, minor_number);
	return stat(path, &status) == 0 && S_ISCHR(status.st_mode) &&
	       status.st_rdev == makedev(NVIDIA_MAJOR, minor_number);
}

/* Moves the process's region to the GPU `target`, under a new name: clones of one snapshot have the same old one. */
int device_in(pid_t pid, struct page *page, const unsigned char target[static 16], bool nodes)
{
	char path[PATH_MAX], piece[PIECE], text[64];
	static const char zeros[PIECE];
	struct gpu gpu;
	uint64_t random;

	uuid_text(text, target);
	if (!find_gpu(text, &gpu))
		return INVALID_DEVICE;
	if (nodes && !has_node(pid, gpu.minor))
		return NO_DEVICE;
	if (gpu.free < page->size)
		return OUT_OF_MEMORY;
	if (getrandom(&random, sizeof random, 0) != sizeof random)
		return UNKNOWN;
	memset(page->token, 0, sizeof page->token);
	snprintf(page->token, sizeof page->token, "%016llx", (unsigned long long)random);
	memcpy(page->uuid, target, sizeof page->uuid);
	device_path(path, target, "");
	mkdir(path, 0777);
	device_path(path, target, page->token);
	int file = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
	if (file < 0)
		return UNKNOWN;
	fchmod(file, 0666); /* the process may be another user */
	bool right = true;
	for (uint64_t done = 0; right && done < page->size;) {
		size_t size = page->size - done < PIECE ? (size_t)(page->size - done) : PIECE;

		right = move(pid, page->region + done, piece, size, false) == 0 &&
			write(file, piece, size) == (ssize_t)size &&
			move(pid, page->region + done, (void *)(uintptr_t)zeros, size, true) == 0;
		done += size;
	}
	close(file);
	size_t from = offsetof(struct page, uuid);
	if (right)
		right = move(pid, PAGE_ADDRESS + from, (char *)page + from, sizeof *page - from, true) == 0;
	if (!right)
		unlink(path);
	return right ? OK : UNKNOWN;
}
