/* Pages of memory: which are zero, which are equal, and writing them into a stopped process. */
#include "native.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, WINDOW_PAGES = 512, WORDS = PAGE_BYTES / sizeof(uint64_t) };

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

int rw_populate(void *start, size_t size)
{
	return madvise(start, size, MADV_POPULATE_WRITE) < 0 ? -errno : 0;
}

static bool is_zero(const uint64_t *page)
{
	/* 256 bytes at a time: short enough to leave early, long enough for the compiler's vectors. */
	for (int at = 0; at < WORDS; at += 32) {
		uint64_t any = 0;

		for (int word = 0; word < 32; word++)
			any |= page[at + word];
		if (any != 0)
			return false;
	}
	return true;
}

static bool is_set(const uint8_t *mask, size_t page)
{
	return mask[page / 8] >> page % 8 & 1;
}

static void set(uint8_t *mask, size_t page)
{
	mask[page / 8] = (uint8_t)(mask[page / 8] | 1u << page % 8);
}

size_t rw_nonzero_pages(const void *data, size_t pages, uint8_t *mask)
{
	size_t found = 0;

	memset(mask, 0, (pages + 7) / 8);
	for (size_t page = 0; page < pages; page++)
		if (!is_zero((const uint64_t *)data + page * WORDS)) {
			set(mask, page);
			found++;
		}
	return found;
}

size_t rw_equal_pages(const void *one, const void *other, size_t pages, uint8_t *mask)
{
	size_t found = 0;

	memset(mask, 0, (pages + 7) / 8);
	for (size_t page = 0; page < pages; page++)
		if (memcmp((const char *)one + page * PAGE_BYTES, (const char *)other + page * PAGE_BYTES, PAGE_BYTES) == 0) {
			set(mask, page);
			found++;
		}
	return found;
}

size_t rw_pack_pages(void *data, size_t pages, const uint8_t *mask)
{
	char *to = data;
	const char *from = data;

	for (size_t page = 0; page < pages; page++, from += PAGE_BYTES)
		if (is_set(mask, page)) {
			if (to != from)
				memmove(to, from, PAGE_BYTES);
			to += PAGE_BYTES;
		}
	return (size_t)(to - (char *)data) / PAGE_BYTES;
}

/* The mask's runs of set bits as address ranges. */
static size_t runs(uint64_t base, const uint8_t *mask, struct iovec *found)
{
	size_t count = 0;

	for (size_t page = 0; page < WINDOW_PAGES; page++) {
		size_t first = page;

		while (page < WINDOW_PAGES && is_set(mask, page))
			page++;
		if (page > first)
			found[count++] = (struct iovec){ (void *)(uintptr_t)(base + first * PAGE_BYTES), (page - first) * PAGE_BYTES };
	}
	return count;
}

/* A process number may be given to another process once its own is gone; a descriptor of it says whether it is. */
static int check_alive(int pidfd)
{
	struct pollfd state = { .fd = pidfd, .events = POLLIN };

	if (pidfd < 0)
		return -EBADF; /* poll would take that for a file on which nothing ever happens */
	if (poll(&state, 1, 0) < 0)
		return errno == EINTR ? 0 : -errno;
	return state.revents != 0 ? -ESRCH : 0;
}

int rw_write_pages(int pid, int pidfd, uint64_t base, const uint8_t *mask, const void *data, size_t length)
{
	struct iovec remote[WINDOW_PAGES / 2 + 1];
	size_t count = runs(base, mask, remote), first = 0, written = 0, total = 0;

	for (size_t at = 0; at < count; at++)
		total += remote[at].iov_len;
	if (total != length)
		return -EINVAL;
	while (written < length) {
		struct iovec local = { (char *)(uintptr_t)data + written, length - written };
		int alive = check_alive(pidfd);
		ssize_t done;

		if (alive < 0)
			return alive;
		done = process_vm_writev(pid, &local, 1, remote + first, count - first, 0);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return done < 0 ? -errno : -EFAULT;
		written += (size_t)done;
		/* A short write ends at any page; go on there, so that what stands against it is reported. */
		for (size_t left = (size_t)done; left > 0;) {
			size_t here = left < remote[first].iov_len ? left : remote[first].iov_len;

			remote[first].iov_base = (char *)remote[first].iov_base + here;
			remote[first].iov_len -= here;
			left -= here;
			if (remote[first].iov_len == 0)
				first++;
		}
	}
	return check_alive(pidfd);
}

int rw_write_forced(int memory_fd, uint64_t base, const uint8_t *mask, const void *data, size_t length)
{
	struct iovec ranges[WINDOW_PAGES / 2 + 1];
	size_t count = runs(base, mask, ranges), written = 0, total = 0;

	for (size_t at = 0; at < count; at++)
		total += ranges[at].iov_len;
	if (total != length)
		return -EINVAL;
	for (size_t at = 0; at < count; at++)
		for (size_t done = 0; done < ranges[at].iov_len;) {
			off_t address = (off_t)((uintptr_t)ranges[at].iov_base + done);
			ssize_t step = pwrite(memory_fd, (const char *)data + written, ranges[at].iov_len - done, address);

			if (step < 0 && errno == EINTR)
				continue;
			if (step <= 0)
				/* 0: the process has no memory any more. */
				return step < 0 ? -errno : -ESRCH;
			done += (size_t)step;
			written += (size_t)step;
		}
	return 0;
}
