#include "tracing.h"

#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

enum {
	PAGE = 4096,
	STOP_PAUSE_NS = 50 * 1000,
	STOP_YIELDS = 200, /* a stop is mostly microseconds away, a sleep costs more than that */
	STOP_TRIES = 40000, /* 2 s, and what the timer adds */
};

int rw_trace(enum __ptrace_request request, pid_t tid, uintptr_t address, const void *data)
{
	return ptrace(request, tid, (void *)address, (void *)(uintptr_t)data) < 0 ? -errno : 0;
}

int rw_trace_number(enum __ptrace_request request, pid_t tid, uintptr_t number)
{
	return rw_trace(request, tid, 0, (const void *)number);
}

int rw_pause(int tries)
{
	const struct timespec pause = { .tv_nsec = STOP_PAUSE_NS };

	if (tries >= STOP_TRIES)
		return -ETIMEDOUT;
	if (tries < STOP_YIELDS)
		sched_yield();
	else
		nanosleep(&pause, NULL);
	return 0;
}

int rw_wait_for_stop(pid_t tid, int *status)
{
	int error = 0;

	for (int tries = 0; error == 0; tries++) {
		pid_t pid = waitpid(tid, status, WNOHANG | __WALL);

		if (pid == tid)
			return WIFSTOPPED(*status) ? 0 : -ESRCH;
		if (pid < 0 && errno != EINTR)
			return errno == ECHILD ? -ESRCH : -errno;
		error = rw_pause(tries);
	}
	return error;
}

int rw_read_memory(pid_t tid, uint64_t address, void *buffer, size_t size)
{
	struct iovec local = { buffer, size };
	struct iovec remote = { (void *)(uintptr_t)address, size };

	return process_vm_readv(tid, &local, 1, &remote, 1, 0) == (ssize_t)size ? 0 : -EFAULT;
}

int rw_write_memory(pid_t tid, uint64_t address, const void *buffer, size_t size)
{
	struct iovec local = { (void *)(uintptr_t)buffer, size };
	struct iovec remote = { (void *)(uintptr_t)address, size };

	return process_vm_writev(tid, &local, 1, &remote, 1, 0) == (ssize_t)size ? 0 : -EFAULT;
}

static uint64_t find_in(pid_t tid, uint64_t start, uint64_t end, const void *code, size_t size)
{
	unsigned char page[PAGE];

	for (; start < end; start += PAGE) {
		const unsigned char *found;

		if (rw_read_memory(tid, start, page, PAGE) < 0)
			continue;
		found = memmem(page, PAGE, code, size);
		if (found != NULL)
			return start + (uint64_t)(found - page);
	}
	return 0;
}

static void cleanup_maps(FILE **maps)
{
	if (*maps != NULL)
		fclose(*maps);
}

static void cleanup_line(char **line)
{
	free(*line);
}

/* Whether a line of /proc/PID/maps is of readable code, and where that is. */
static bool is_code(const char *line, unsigned long *start, unsigned long *end)
{
	char protection[8];

	return sscanf(line, "%lx-%lx %7s", start, end, protection) == 3 && protection[0] == 'r' && protection[2] == 'x';
}

int rw_find_code(pid_t tid, const void *code, size_t size, const char *const *names, uint64_t *address)
{
	__attribute__((cleanup(cleanup_maps))) FILE *maps = NULL;
	__attribute__((cleanup(cleanup_line))) char *line = NULL;
	unsigned long start, end;
	size_t room = 0;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/maps", tid);
	maps = fopen(path, "re");
	if (maps == NULL)
		return errno == ENOENT ? -ESRCH : -errno;
	for (; *names != NULL; names++) {
		rewind(maps);
		while (getline(&line, &room, maps) > 0) {
			if (!is_code(line, &start, &end) || strstr(line, *names) == NULL)
				continue;
			*address = find_in(tid, start, end, code, size);
			if (*address != 0)
				return 0;
		}
	}
	return -ENOEXEC;
}
