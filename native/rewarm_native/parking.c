/* Holding threads of other processes still. They are traced (ptrace(2), PTRACE_SEIZE), and stop at the border to user
 * space; what they do in the kernel goes on when they are let go. Nothing is taken from them: statuses are looked at,
 * not collected (WNOWAIT), so that a signal that was on its way is delivered even if the tracer is killed
 * (kernel/signal.c, ptrace_stop: it goes on with the exit code that it finds).
 */
#include "native.h"
#include "tracing.h"

#include <errno.h>
#include <sys/wait.h>

int rw_hold(int tid)
{
	int error = rw_trace(PTRACE_SEIZE, tid, 0, NULL);

	return error < 0 ? error : rw_interrupt(tid);
}

int rw_interrupt(int tid)
{
	return rw_trace(PTRACE_INTERRUPT, tid, 0, NULL);
}

/* Looks whether the thread has stopped: 1, with its status as waitid(2) has it, 0 if not yet. -ESRCH when it has ended,
 * which is then collected: until that is done its process does not end. */
static int look(pid_t tid, int *status)
{
	siginfo_t info = { .si_pid = 0 };

	if (waitid(P_PID, (id_t)tid, &info, WSTOPPED | WEXITED | WNOHANG | WNOWAIT | __WALL) < 0)
		return errno == ECHILD ? -ESRCH : -errno;
	if (info.si_pid == 0)
		return 0;
	if (info.si_code == CLD_TRAPPED) {
		*status = info.si_status;
		return 1;
	}
	waitpid(tid, NULL, WNOHANG | __WALL);
	return -ESRCH;
}

int rw_is_held(int tid)
{
	int status;

	return look(tid, &status);
}

int rw_let_go(int tid)
{
	int status;
	int stopped = look(tid, &status);

	if (stopped <= 0)
		return stopped < 0 ? stopped : -EBUSY;
	/* A stop for a signal: it is on its way to the thread, and gets there now. */
	return rw_trace_number(PTRACE_DETACH, tid, status >> RW_EVENT_SHIFT == 0 ? (uintptr_t)status : 0);
}
