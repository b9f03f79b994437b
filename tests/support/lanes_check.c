/* native/rewarm_native/lanes.c, for a build with sanitizers: runs of a file in any sizes into buffers of the exact size on
 * the heap, by a driver whose copies happen when somebody waits for them. Prints "ok". */
#include "native.h"

#include <assert.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SIZE = 64, WINDOWS = 40, MOST = 3, SLOTS = 4 };

struct copy {
	unsigned char *to;
	const void *from;
	size_t size;
};

static struct copy begun[4 * WINDOWS];
static size_t count, over;
static size_t uploads, fails_at;

static int upload(uint64_t device, const void *host, size_t size, void *stream)
{
	(void)stream;
	if (++uploads == fails_at)
		return 700;
	begun[count++] = (struct copy){ (unsigned char *)(uintptr_t)device, host, size };
	return 0;
}

static int record(void *event, void *stream)
{
	(void)stream;
	*(size_t *)event = count;
	return 0;
}

static int wait_for(void *event)
{
	for (; over < *(size_t *)event; over++)
		memcpy(begun[over].to, begun[over].from, begun[over].size);
	return 0;
}

static const struct rw_lane_calls calls = { (void *)upload, NULL, (void *)record, (void *)wait_for };

/* A file here whose windows each have bytes of their own; only the first `windows` of them are there. */
static int make_file(size_t windows)
{
	int fd = open("windows", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	unsigned char data[SIZE];

	assert(fd >= 0 && unlink("windows") == 0);
	for (size_t at = 0; at < windows; at++) {
		memset(data, (int)at + 1, sizeof(data));
		assert(write(fd, data, sizeof(data)) == (ssize_t)sizeof(data));
	}
	return fd;
}

static void check(size_t slots, size_t there)
{
	struct rw_run runs[WINDOWS];
	uint64_t devices[WINDOWS];
	size_t order[WINDOWS], marks[SLOTS] = { 0 }, first = (size_t)rand() % slots, used = 0, done, all = 0;
	void *buffers[SLOTS], *events[SLOTS];
	unsigned char *device = calloc(WINDOWS, SIZE);
	int fd = make_file(there), refused = 9;

	count = over = 0;
	for (size_t at = 0; at < WINDOWS; at++)
		order[at] = at;
	for (size_t at = WINDOWS - 1; at > 0 && rand() % 3 > 0; at--) {
		size_t other = (size_t)rand() % (at + 1), kept = order[at];

		order[at] = order[other];
		order[other] = kept;
	}
	for (size_t at = 0; at < WINDOWS; at++)
		devices[at] = (uintptr_t)(device + order[at] * SIZE);
	for (size_t at = 0; at < slots; at++) {
		buffers[at] = malloc(MOST * SIZE);
		events[at] = &marks[at];
	}
	for (size_t at = 0; at < WINDOWS; used++) {
		size_t windows = 1 + (size_t)rand() % MOST;

		windows = windows < WINDOWS - at ? windows : WINDOWS - at;
		runs[used] = (struct rw_run){ at * SIZE, windows };
		at += windows;
		all += at <= there;
	}
	struct rw_ring ring = { buffers, events, slots, first };

	assert(rw_upload_file(&calls, fd, runs, used, devices, SIZE, NULL, &ring, &done, &refused) == 0 && refused == 0);
	assert(done == all && ring.next == (first + done) % slots);
	/* But for what the other buffers have all is there; then that as well. */
	for (size_t pass = 0; pass < 2; pass++) {
		size_t at = 0;

		for (size_t run = 0; run < done; run++)
			for (size_t window = 0; window < runs[run].windows; window++, at++)
				for (size_t byte = 0; byte < SIZE && (pass == 1 || run + slots <= done); byte++)
					assert(device[order[at] * SIZE + byte] == at + 1);
		for (; at < WINDOWS; at++)
			assert(device[order[at] * SIZE] == 0);
		wait_for(&count);
	}
	for (size_t at = 0; at < slots; at++)
		free(buffers[at]);
	free(device);
	close(fd);
}

static void check_failure(void)
{
	unsigned char buffer[SIZE], device[2 * SIZE] = { 0 };
	uint64_t devices[] = { (uintptr_t)device, (uintptr_t)device + SIZE };
	const struct rw_run runs[] = { { 0, 1 }, { SIZE, 1 } };
	size_t mark = 0, done = 9;
	void *buffers[] = { buffer }, *events[] = { &mark };
	int fd = make_file(2), refused = 9;
	struct rw_ring ring = { buffers, events, 1, 0 };

	count = over = uploads = 0;
	fails_at = 2;
	assert(rw_upload_file(&calls, fd, runs, 2, devices, SIZE, NULL, &ring, &done, &refused) == 700 && done == 1);
	fails_at = 0;
	close(fd);
	done = 9;
	assert(rw_upload_file(&calls, fd, runs, 2, devices, SIZE, NULL, &ring, &done, &refused) == 0 && done == 0);
	assert(rw_upload_file(&calls, fd, runs, 0, devices, SIZE, NULL, &ring, &done, &refused) == 0 && done == 0);
	assert(refused == 0);
	/* On Linux 6.18 a file in memory cannot be asked; where it can, nothing is wrong with it. */
	int memory = memfd_create("windows", MFD_CLOEXEC);

	assert(memory >= 0 && write(memory, buffer, SIZE) == SIZE);
	assert(rw_upload_file(&calls, memory, runs, 1, devices, SIZE, NULL, &ring, &done, &refused) == 0);
	assert(done + (size_t)refused == 1);
	close(memory);
}

int main(void)
{
	for (size_t turn = 0; turn < 2000; turn++)
		check(1 + (size_t)rand() % SLOTS, (size_t)rand() % (WINDOWS + 1));
	check_failure();
	puts("ok");
	return 0;
}
