/* native/rewarm_native/memory.c against a simple model, for a build with sanitizers: buffers of the exact size on the
 * heap, random masks, and a stopped child that is written to. Prints "ok". */
#include "native.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BYTES = 4096, PAGES = 512 };

static void *pages(size_t count)
{
	void *found = aligned_alloc(BYTES, count == 0 ? BYTES : count * BYTES);

	assert(found != NULL);
	return found;
}

static bool bit(const uint8_t *mask, size_t at)
{
	return mask[at / 8] >> at % 8 & 1;
}

static void check_masks(size_t count)
{
	unsigned char *one = pages(count), *other = pages(count);
	uint8_t *mask = malloc((count + 7) / 8 + (count == 0));
	size_t nonzero = 0, equal = 0;

	memset(one, 0, count * BYTES);
	for (size_t at = 0; at < count; at++)
		if (rand() % 2)
			one[at * BYTES + (size_t)rand() % BYTES] = 1;
	memcpy(other, one, count * BYTES);
	for (size_t at = 0; at < count; at++)
		if (rand() % 2)
			other[at * BYTES + BYTES - 1] ^= 2;
	for (size_t at = 0; at < count; at++) {
		equal += memcmp(one + at * BYTES, other + at * BYTES, BYTES) == 0;
		for (size_t byte = 0; byte < BYTES; byte++)
			if (one[at * BYTES + byte] != 0) {
				nonzero++;
				break;
			}
	}
	assert(rw_equal_pages(one, other, count, mask) == equal);
	for (size_t at = 0; at < count; at++)
		assert(bit(mask, at) == (memcmp(one + at * BYTES, other + at * BYTES, BYTES) == 0));
	assert(rw_nonzero_pages(one, count, mask) == nonzero);
	assert(rw_pack_pages(one, count, mask) == nonzero);
	free(mask);
	free(one);
	free(other);
}

static void check_write(bool forced)
{
	size_t length = (size_t)PAGES * BYTES;
	unsigned char *area = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint8_t mask[PAGES / 8];
	size_t count = 0;
	char path[64];

	assert(area != MAP_FAILED);
	pid_t child = fork();
	assert(child >= 0);
	if (child == 0) {
		raise(SIGSTOP);
		_exit(0);
	}
	assert(waitpid(child, NULL, WUNTRACED) == child);
	int pidfd = (int)syscall(SYS_pidfd_open, child, 0);
	snprintf(path, sizeof path, "/proc/%d/mem", child);
	int memory = open(path, O_RDWR | O_CLOEXEC);
	assert(pidfd >= 0 && memory >= 0);
	for (size_t at = 0; at < sizeof mask; at++) {
		mask[at] = (uint8_t)(at % 3 == 0 ? 0x55 : rand());
		count += (size_t)__builtin_popcount(mask[at]);
	}
	unsigned char *data = pages(count), *back = pages(1);
	for (size_t at = 0; at < count * BYTES; at++)
		data[at] = (unsigned char)rand();
	uint64_t base = (uint64_t)(uintptr_t)area;
	if (forced)
		assert(rw_write_forced(memory, base, mask, data, count * BYTES) == 0);
	else
		assert(rw_write_pages(child, pidfd, base, mask, data, count * BYTES) == 0);
	for (size_t at = 0, from = 0; at < PAGES; at++) {
		assert(pread(memory, back, BYTES, (off_t)(base + at * BYTES)) == BYTES);
		for (size_t byte = 0; byte < BYTES; byte++)
			assert(back[byte] == (bit(mask, at) ? data[from * BYTES + byte] : 0));
		from += bit(mask, at);
	}
	assert(rw_write_pages(child, pidfd, base, mask, data, count * BYTES - BYTES) == -EINVAL);
	assert(rw_write_forced(memory, base, mask, data, count * BYTES - BYTES) == -EINVAL);
	assert(rw_write_pages(child, pidfd, 0, mask, data, count * BYTES) == -EFAULT);
	kill(child, SIGKILL);
	assert(waitpid(child, NULL, 0) == child);
	assert(rw_write_pages(child, pidfd, base, mask, data, count * BYTES) == -ESRCH);
	assert(rw_write_forced(memory, base, mask, data, count * BYTES) == -ESRCH);
	close(memory);
	close(pidfd);
	free(data);
	free(back);
	munmap(area, length);
}

int main(void)
{
	srand(1);
	for (size_t count = 0; count < 70; count++)
		check_masks(count);
	check_masks(PAGES);
	check_write(false);
	check_write(true);
	puts("ok");
	return 0;
}
