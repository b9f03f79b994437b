/* By ptrace: the thread's registers are pointed at a `syscall` instruction that its program has anyway, and put back
 * afterwards. Works the same whether the thread is in a group stop (SIGSTOP), which then lasts, or runs.
 */
#include "borrow.h"
#include "tracing.h"

#include <errno.h>

#ifndef __x86_64__

int rw_borrow(int tid, int (*work)(struct borrowed *thread, void *argument), void *argument)
{
	(void)tid;
	(void)work;
	(void)argument;
	return -ENOSYS;
}

int rw_call(const struct borrowed *thread, uint64_t number, const uint64_t arguments[6], int64_t *result)
{
	(void)thread;
	(void)number;
	(void)arguments;
	(void)result;
	return -ENOSYS;
}

#else

#include <sys/user.h>
#include <sys/wait.h>

/* In the vdso, which nearly every process has, or in any other code. */
static int find_instruction(pid_t tid, uint64_t *instruction)
{
	static const unsigned char code[] = { 0x0f, 0x05 };
	static const char *const names[] = { "[vdso]", "", NULL };

	return rw_find_code(tid, code, sizeof(code), names, instruction);
}

/* A restartable sequence (rseq(2)) that the stop interrupted has to go to its abort handler. The kernel sees to
 * that when the thread returns to user space, but by then the registers point elsewhere, and it would forget the
 * sequence. */
static int leave_restartable_sequence(struct borrowed *target)
{
	struct __ptrace_rseq_configuration rseq;
	struct {
		uint32_t version, flags;
		uint64_t start, length, abort;
	} section;
	uint64_t address;

	if (ptrace(PTRACE_GET_RSEQ_CONFIGURATION, target->tid, sizeof(rseq), &rseq) < 0)
		return errno == EIO || errno == EINVAL ? 0 : -errno; /* a kernel without rseq or without the request */
	if (rseq.rseq_abi_pointer == 0)
		return 0;
	if (rw_read_memory(target->tid, rseq.rseq_abi_pointer + 8, &address, sizeof(address)) < 0)
		return -EFAULT;
	if (address == 0)
		return 0;
	if (rw_read_memory(target->tid, address, &section, sizeof(section)) < 0)
		return -EFAULT;
	if (target->registers.rip - section.start < section.length)
		target->registers.rip = section.abort;
	return 0;
}

/* Lets the thread go on to its next system call stop. Every signal that can be is blocked meanwhile, so what comes
 * between is a group stop, a SIGSTOP sent again, or a fault of the injected code itself. */
static int go_to_syscall_stop(pid_t tid)
{
	uintptr_t signal = 0;

	for (;;) {
		int status;
		int error = rw_trace_number(PTRACE_SYSCALL, tid, signal);

		if (error == 0)
			error = rw_wait_for_stop(tid, &status);
		if (error < 0)
			return error;
		if (WSTOPSIG(status) == RW_SYSCALL_STOP)
			return 0;
		signal = 0;
		if (status >> 16 != 0)
			continue;
		if (WSTOPSIG(status) != SIGSTOP)
			return -EFAULT;
		signal = SIGSTOP;
	}
}

/* Sets *result to what the call returned. orig_rax of -1: whatever rax is, the kernel sees no interrupted call to
 * restart. */
int rw_call(const struct borrowed *target, uint64_t number, const uint64_t arguments[6], int64_t *result)
{
	struct user_regs_struct registers = target->registers;
	int error;

	registers.rip = target->instruction;
	registers.rax = number;
	registers.orig_rax = UINT64_MAX;
	registers.rdi = arguments[0];
	registers.rsi = arguments[1];
	registers.rdx = arguments[2];
	registers.r10 = arguments[3];
	registers.r8 = arguments[4];
	registers.r9 = arguments[5];

	error = rw_trace(PTRACE_SETREGS, target->tid, 0, &registers);
	for (int stops = 0; error == 0 && stops < 2; stops++) /* entry and exit */
		error = go_to_syscall_stop(target->tid);
	if (error == 0)
		error = rw_trace(PTRACE_GETREGS, target->tid, 0, &registers);
	*result = (int64_t)registers.rax;
	return error;
}

/* Attaches to the thread and leaves it in a stop at the border to user space. */
static int seize(pid_t tid)
{
	/* Seccomp must not judge calls that are not the program's. The kernel grants that to CAP_SYS_ADMIN only;
	 * others may still get by. EXITKILL: with foreign registers the program must not go on if we die. Set once
	 * it is stopped, not before. */
	const uintptr_t options = PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL;
	int status;
	int error = rw_trace_number(PTRACE_SEIZE, tid, PTRACE_O_TRACESYSGOOD);

	if (error < 0)
		return error;
	error = rw_trace(PTRACE_INTERRUPT, tid, 0, NULL);
	if (error == 0)
		error = rw_wait_for_stop(tid, &status);
	/* A signal on its way is delivered first. */
	while (error == 0 && status >> 16 != PTRACE_EVENT_STOP) {
		error = rw_trace_number(PTRACE_CONT, tid, (uintptr_t)WSTOPSIG(status));
		if (error == 0)
			error = rw_wait_for_stop(tid, &status);
	}
	if (error == 0 && rw_trace_number(PTRACE_SETOPTIONS, tid, options | PTRACE_O_SUSPEND_SECCOMP) < 0)
		error = rw_trace_number(PTRACE_SETOPTIONS, tid, options);
	return error;
}

static int save(struct borrowed *target)
{
	int error = rw_trace(PTRACE_GETREGS, target->tid, 0, &target->registers);

	if (error == 0 && target->registers.cs != RW_USER_CODE_64)
		error = -ENOSYS;
	if (error == 0)
		error = leave_restartable_sequence(target);
	if (error == 0)
		error = find_instruction(target->tid, &target->instruction);
	if (error == 0)
		error = rw_trace(PTRACE_GETSIGMASK, target->tid, sizeof(target->signal_mask), &target->signal_mask);
	return error;
}

static int block_signals(const struct borrowed *target)
{
	const uint64_t all = UINT64_MAX;

	return rw_trace(PTRACE_SETSIGMASK, target->tid, sizeof(all), &all);
}

/* Back to a stop of the kind that `seize` found, then to the registers of then: only from there does the kernel
 * restart the system call that the thread was in. */
static int restore(const struct borrowed *target)
{
	uintptr_t signal = 0;
	int status = 0;
	int error = rw_trace(PTRACE_INTERRUPT, target->tid, 0, NULL);

	while (error == 0 && status >> 16 != PTRACE_EVENT_STOP) {
		error = rw_trace_number(PTRACE_CONT, target->tid, signal);
		if (error == 0)
			error = rw_wait_for_stop(target->tid, &status);
		signal = WSTOPSIG(status) == SIGSTOP ? SIGSTOP : 0; /* sent again meanwhile: goes on its way */
	}
	if (error == 0)
		error = rw_trace(PTRACE_SETREGS, target->tid, 0, &target->registers);
	if (error == 0)
		error = rw_trace(PTRACE_SETSIGMASK, target->tid, sizeof(target->signal_mask), &target->signal_mask);
	return error;
}

int rw_borrow(int tid, int (*work)(struct borrowed *thread, void *argument), void *argument)
{
	struct borrowed target = { .tid = tid };
	int error = seize(tid);
	int restored = 0;

	if (error < 0)
		return error;
	error = save(&target);
	if (error == 0) {
		error = block_signals(&target);
		if (error == 0)
			error = work(&target, argument);
		restored = restore(&target);
	}
	/* Not detached on purpose if the registers are not back: EXITKILL then ends the program with this thread's
	 * process, as rewarm never lets a process run that is not whole. */
	if (restored == 0)
		restored = rw_trace_number(PTRACE_DETACH, tid, 0);
	return error < 0 ? error : restored;
}

#endif
