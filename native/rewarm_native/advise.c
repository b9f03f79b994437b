/* MADV_HUGEPAGE for the large mappings that a thread of another process makes, before it uses them: the thread is
 * traced from system call to system call, and sent on a detour (detour.c) to madvise(2) after such an mmap(2).
 *
 * Nothing here has to be undone. When the tracing thread ends, however it does, the kernel lets go of the other one
 * wherever that is: running, in a system call (which is not interrupted), in a group stop (which lasts) or on its
 * detour. A signal that it was about to get arrives as well, as a stop is looked at and never taken (WNOWAIT): taking
 * it would take the signal.
 */
#include "detour.h"
#include "tracing.h"

#include <errno.h>
#include <linux/audit.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>

enum {
	OPTIONS = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXEC,
	EVENT_SHIFT = 8,
};

struct watch {
	const struct rw_way *way;
	uint64_t smallest;
	uint64_t length; /* of the mapping that the thread is making; 0: of none */
	uint64_t flags;  /* that it has asked for, if others were put in their place; else 0 */
	uint64_t stack;  /* of its latest detour */
	bool unjudged;   /* seccomp is off */
};

/* Any stop or end of what the calling thread traces; si_pid is 0 when `flags` say not to wait for it. */
static int peek(int flags, siginfo_t *found)
{
	/* By no pid: a thread that calls execve(2) takes another. */
	const int what = WSTOPPED | WEXITED | WNOWAIT | __WALL | __WNOTHREAD;

	do {
		found->si_pid = 0;
		if (waitid(P_ALL, 0, found, what | flags) == 0)
			return 0;
	} while (errno == EINTR);
	return -errno;
}

int rw_watch_begin(int tid, struct rw_way *way)
{
	siginfo_t stop;
	int error = rw_find_way(tid, way);

	if (error == 0)
		error = rw_trace_number(PTRACE_SEIZE, tid, OPTIONS);
	if (error == 0)
		error = rw_trace(PTRACE_INTERRUPT, tid, 0, NULL);
	for (int tries = 0; error == 0; tries++) {
		error = peek(WNOHANG, &stop);
		if (error == 0 && stop.si_pid != 0)
			return 0;
		if (error == 0 && rw_pause(tries) < 0)
			return 0; /* in the kernel for long: it is watched from then on */
	}
	return error;
}

static bool is_wanted(const struct watch *watch, const struct __ptrace_syscall_info *info)
{
	const int kind = MAP_PRIVATE | MAP_ANONYMOUS, other = MAP_SHARED | MAP_GROWSDOWN | MAP_HUGETLB;
	const uint64_t *arguments = info->entry.args;

	return info->arch == AUDIT_ARCH_X86_64 && info->entry.nr == SYS_mmap && arguments[1] >= watch->smallest &&
	       (arguments[2] & PROT_WRITE) != 0 && (arguments[3] & (uint64_t)(kind | other)) == (uint64_t)kind;
}

/* Seccomp must not judge calls that are not the program's: off from the stop before such a call to the one after it,
 * when no code of the program runs. The kernel grants that to CAP_SYS_ADMIN only; others may still get by. */
static void suspend_seccomp(pid_t tid, struct watch *watch, bool on)
{
	const uintptr_t options = on ? OPTIONS | PTRACE_O_SUSPEND_SECCOMP : OPTIONS;

	if (on != watch->unjudged && rw_trace_number(PTRACE_SETOPTIONS, tid, options) == 0)
		watch->unjudged = on;
}

static int set_flags(pid_t tid, uint64_t flags)
{
	return rw_trace(PTRACE_POKEUSER, tid, offsetof(struct user, regs.r10), (const void *)flags);
}

/* The kernel would fill a mapping that is to be populated before the call returns, with small pages. That is only a
 * wish: what the thread uses of it comes to it all the same. */
static void populate_later(pid_t tid, struct watch *watch, uint64_t flags)
{
	const uint64_t fewer = flags & ~(uint64_t)MAP_POPULATE;

	watch->flags = fewer != flags && set_flags(tid, fewer) == 0 ? flags : 0;
}

static void at_entry(pid_t tid, struct watch *watch, const struct __ptrace_syscall_info *info)
{
	const bool own = watch->stack != 0 && rw_is_detour(info->entry.nr, SYS_madvise, info->stack_pointer - watch->stack);

	watch->length = is_wanted(watch, info) ? info->entry.args[1] : 0;
	if (watch->length != 0)
		populate_later(tid, watch, info->entry.args[3]);
	suspend_seccomp(tid, watch, own);
	if (own && info->entry.nr != SYS_madvise)
		watch->stack = 0;
}

static void at_return(pid_t tid, struct watch *watch, const struct __ptrace_syscall_info *info)
{
	const uint64_t arguments[3] = { (uint64_t)info->exit.rval, watch->length, MADV_HUGEPAGE };

	suspend_seccomp(tid, watch, false);
	if (watch->flags != 0)
		set_flags(tid, watch->flags); /* a system call leaves this register alone */
	watch->flags = 0;
	if (watch->length == 0 || info->exit.is_error)
		return;
	watch->length = 0;
	if (rw_send(tid, watch->way, SYS_madvise, arguments, &watch->stack) < 0)
		watch->stack = 0; /* no huge pages then */
}

static void at_system_call(pid_t tid, struct watch *watch)
{
	struct __ptrace_syscall_info info;

	if (rw_trace(PTRACE_GET_SYSCALL_INFO, tid, sizeof(info), &info) < 0)
		return;
	if (info.op == PTRACE_SYSCALL_INFO_ENTRY)
		at_entry(tid, watch, &info);
	else if (info.op == PTRACE_SYSCALL_INFO_EXIT)
		at_return(tid, watch, &info);
}

/* Lets the thread go on from a stop: as it would have gone on had nobody looked. */
static int go_on(pid_t tid, struct watch *watch, int status)
{
	const int event = status >> EVENT_SHIFT;

	if (event == PTRACE_EVENT_EXEC)
		return -ENOEXEC;
	if (event == PTRACE_EVENT_STOP && (status & 0x7f) != SIGTRAP)
		return rw_trace(PTRACE_LISTEN, tid, 0, NULL);
	if (event == 0 && status == RW_SYSCALL_STOP)
		at_system_call(tid, watch);
	else
		suspend_seccomp(tid, watch, false);
	return rw_trace_number(PTRACE_SYSCALL, tid, event == 0 && status != RW_SYSCALL_STOP ? (uintptr_t)status : 0);
}

int rw_watch(const struct rw_way *way, uint64_t smallest)
{
	struct watch watch = { .way = way, .smallest = smallest };
	siginfo_t stop;
	int error;

	for (;;) {
		error = peek(0, &stop);
		if (error < 0)
			return error;
		if (stop.si_code != CLD_TRAPPED) {
			waitpid(stop.si_pid, NULL, __WALL | WNOHANG); /* who waits for the thread's end waits for this */
			return 0;
		}
		error = go_on(stop.si_pid, &watch, stop.si_status);
		if (error < 0 && error != -ESRCH) /* killed in its stop: its end comes next */
			return error;
	}
}
