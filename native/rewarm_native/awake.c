#include "native.h"
#include "tracing.h"

#include <errno.h>
#include <stdbool.h>
#include <sys/wait.h>

enum { EVENT_OF_STATUS = 16 };

static const uint64_t every_signal = ~UINT64_C(0);

static bool is_event(int status, int event)
{
	return status >> EVENT_OF_STATUS == event;
}

static int block_and_go_on(pid_t tid)
{
	const int error = rw_trace(PTRACE_SETSIGMASK, tid, sizeof(every_signal), &every_signal);

	return error < 0 ? error : rw_trace_number(PTRACE_CONT, tid, 0);
}

/* Waits for the stop that PTRACE_INTERRUPT or a group stop makes; what comes before it goes its way. */
static int wait_for_event_stop(pid_t tid)
{
	for (;;) {
		int status;
		int error = rw_wait_for_stop(tid, &status);

		if (error < 0 || is_event(status, PTRACE_EVENT_STOP))
			return error;
		error = rw_trace_number(PTRACE_CONT, tid, status >> EVENT_OF_STATUS == 0 ? (uintptr_t)WSTOPSIG(status) : 0);
		if (error < 0)
			return error;
	}
}

int rw_rouse(int tid, uint64_t *mask)
{
	int error = rw_trace_number(PTRACE_SEIZE, tid, PTRACE_O_TRACECLONE);

	if (error == 0)
		error = rw_trace(PTRACE_INTERRUPT, tid, 0, NULL);
	if (error == 0)
		error = wait_for_event_stop(tid);
	if (error == 0)
		error = rw_trace(PTRACE_GETSIGMASK, tid, sizeof(*mask), mask);
	return error < 0 ? error : block_and_go_on(tid);
}

int rw_keep_awake(int *born)
{
	int status;
	/* Only what this thread traces: the process has children whose end is for others to hear. */
	const pid_t tid = waitpid(-1, &status, WNOHANG | __WALL | __WNOTHREAD);
	int error;

	if (tid <= 0)
		return tid == 0 || errno == ECHILD ? 0 : -errno;
	if (!WIFSTOPPED(status))
		return 1;
	if (is_event(status, PTRACE_EVENT_STOP)) {
		*born = tid;
		error = block_and_go_on(tid);
	} else {
		error = rw_trace_number(PTRACE_CONT, tid, status >> EVENT_OF_STATUS == 0 ? (uintptr_t)WSTOPSIG(status) : 0);
	}
	return error < 0 && error != -ESRCH ? error : 1; /* killed in its stop: its end comes next */
}

int rw_let_sleep(int tid, uint64_t mask)
{
	int error = rw_trace(PTRACE_INTERRUPT, tid, 0, NULL);

	if (error == 0)
		error = wait_for_event_stop(tid);
	if (error == 0)
		error = rw_trace(PTRACE_SETSIGMASK, tid, sizeof(mask), &mask);
	return error < 0 ? error : rw_trace_number(PTRACE_DETACH, tid, 0);
}
