/* NUMA memory policies for another process. Linux lets a process set only its own, so a thread of the target runs the
 * system calls, by ptrace: its registers are pointed at a `syscall` instruction that it has anyway, and put back
 * afterwards.
 *
 * The node masks lie in a page that the target maps for it and unmaps again: its stack may be small, foreign or full,
 * and is left alone. Works the same whether the thread is in a group stop (SIGSTOP), which then lasts, or runs.
 */
#include "native.h"

#include <errno.h>

#ifndef __x86_64__

int rw_set_policies(int tid, const struct rw_policy *policies, size_t count, size_t *failed)
{
	(void)tid;
	(void)policies;
	*failed = count;
	return -ENOSYS;
}

#else

#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>

enum {
	PAGE = 4096,
	STOP_PAUSE_NS = 50 * 1000,
	STOP_YIELDS = 200,             /* a stop is mostly microseconds away, a sleep costs more than that */
	STOP_TRIES = 40000,            /* 2 s, and what the timer adds */
	SYSCALL_STOP = SIGTRAP | 0x80, /* by PTRACE_O_TRACESYSGOOD */
	USER_CODE_64 = 0x33,           /* the code segment of 64-bit programs */
};

struct target {
	pid_t tid;
	uint64_t instruction; /* address of a `syscall` in the target */
	uint64_t scratch;     /* a page of the target for arguments */
	uint64_t signal_mask;
	struct user_regs_struct registers;
};

/* ptrace(2) with the types that its wrapper in glibc hides. */
static int trace(enum __ptrace_request request, pid_t tid, uintptr_t address, const void *data)
{
	return ptrace(request, tid, (void *)address, (void *)(uintptr_t)data) < 0 ? -errno : 0;
}

static int trace_number(enum __ptrace_request request, pid_t tid, uintptr_t number)
{
	return trace(request, tid, 0, (const void *)number);
}

/* Bounded: a thread that is stuck in the kernel must not take the caller with it. */
static int wait_for_stop(pid_t tid, int *status)
{
	const struct timespec pause = { .tv_nsec = STOP_PAUSE_NS };

	for (int tries = 0; tries < STOP_TRIES; tries++) {
		pid_t pid = waitpid(tid, status, WNOHANG | __WALL);

		if (pid == tid)
			return WIFSTOPPED(*status) ? 0 : -ESRCH;
		if (pid < 0 && errno != EINTR)
			return errno == ECHILD ? -ESRCH : -errno;
		if (tries < STOP_YIELDS)
			sched_yield();
		else
			nanosleep(&pause, NULL);
	}
	return -ETIMEDOUT;
}

static int read_memory(pid_t tid, uint64_t address, void *buffer, size_t size)
{
	struct iovec local = { buffer, size };
	struct iovec remote = { (void *)(uintptr_t)address, size };

	return process_vm_readv(tid, &local, 1, &remote, 1, 0) == (ssize_t)size ? 0 : -EFAULT;
}

static int write_memory(pid_t tid, uint64_t address, const void *buffer, size_t size)
{
	struct iovec local = { (void *)(uintptr_t)buffer, size };
	struct iovec remote = { (void *)(uintptr_t)address, size };

	return process_vm_writev(tid, &local, 1, &remote, 1, 0) == (ssize_t)size ? 0 : -EFAULT;
}

static uint64_t find_instruction_in(pid_t tid, uint64_t start, uint64_t end)
{
	static const unsigned char syscall_instruction[] = { 0x0f, 0x05 };
	unsigned char page[PAGE];

	for (; start < end; start += PAGE) {
		const unsigned char *found;

		if (read_memory(tid, start, page, PAGE) < 0)
			continue;
		found = memmem(page, PAGE, syscall_instruction, sizeof(syscall_instruction));
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

/* In the vdso, which nearly every process has, or in any other code. */
static int find_instruction(pid_t tid, uint64_t *instruction)
{
	__attribute__((cleanup(cleanup_maps))) FILE *maps = NULL;
	__attribute__((cleanup(cleanup_line))) char *line = NULL;
	unsigned long start, end;
	size_t room = 0;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/maps", tid);
	maps = fopen(path, "re");
	if (maps == NULL)
		return -errno;
	for (int everywhere = 0; everywhere < 2; everywhere++) {
		rewind(maps);
		while (getline(&line, &room, maps) > 0) {
			if (!is_code(line, &start, &end) || (!everywhere && strstr(line, "[vdso]") == NULL))
				continue;
			*instruction = find_instruction_in(tid, start, end);
			if (*instruction != 0)
				return 0;
		}
	}
	return -ENOEXEC;
}

/* A restartable sequence (rseq(2)) that the stop interrupted has to go to its abort handler. The kernel sees to
 * that when the thread returns to user space, but by then the registers point elsewhere, and it would forget the
 * sequence. */
static int leave_restartable_sequence(struct target *target)
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
	if (read_memory(target->tid, rseq.rseq_abi_pointer + 8, &address, sizeof(address)) < 0)
		return -EFAULT;
	if (address == 0)
		return 0;
	if (read_memory(target->tid, address, &section, sizeof(section)) < 0)
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
		int error = trace_number(PTRACE_SYSCALL, tid, signal);

		if (error == 0)
			error = wait_for_stop(tid, &status);
		if (error < 0)
			return error;
		if (WSTOPSIG(status) == SYSCALL_STOP)
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
static int call_in_target(const struct target *target, uint64_t number, const uint64_t arguments[6], int64_t *result)
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

	error = trace(PTRACE_SETREGS, target->tid, 0, &registers);
	for (int stops = 0; error == 0 && stops < 2; stops++) /* entry and exit */
		error = go_to_syscall_stop(target->tid);
	if (error == 0)
		error = trace(PTRACE_GETREGS, target->tid, 0, &registers);
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
	int error = trace_number(PTRACE_SEIZE, tid, PTRACE_O_TRACESYSGOOD);

	if (error < 0)
		return error;
	error = trace(PTRACE_INTERRUPT, tid, 0, NULL);
	if (error == 0)
		error = wait_for_stop(tid, &status);
	/* A signal on its way is delivered first. */
	while (error == 0 && status >> 16 != PTRACE_EVENT_STOP) {
		error = trace_number(PTRACE_CONT, tid, (uintptr_t)WSTOPSIG(status));
		if (error == 0)
			error = wait_for_stop(tid, &status);
	}
	if (error == 0 && trace_number(PTRACE_SETOPTIONS, tid, options | PTRACE_O_SUSPEND_SECCOMP) < 0)
		error = trace_number(PTRACE_SETOPTIONS, tid, options);
	return error;
}

static int save(struct target *target)
{
	int error = trace(PTRACE_GETREGS, target->tid, 0, &target->registers);

	if (error == 0 && target->registers.cs != USER_CODE_64)
		error = -ENOSYS;
	if (error == 0)
		error = leave_restartable_sequence(target);
	if (error == 0)
		error = find_instruction(target->tid, &target->instruction);
	if (error == 0)
		error = trace(PTRACE_GETSIGMASK, target->tid, sizeof(target->signal_mask), &target->signal_mask);
	return error;
}

static int block_signals(const struct target *target)
{
	const uint64_t all = UINT64_MAX;

	return trace(PTRACE_SETSIGMASK, target->tid, sizeof(all), &all);
}

/* Back to a stop of the kind that `seize` found, then to the registers of then: only from there does the kernel
 * restart the system call that the thread was in. */
static int restore(const struct target *target)
{
	uintptr_t signal = 0;
	int status = 0;
	int error = trace(PTRACE_INTERRUPT, target->tid, 0, NULL);

	while (error == 0 && status >> 16 != PTRACE_EVENT_STOP) {
		error = trace_number(PTRACE_CONT, target->tid, signal);
		if (error == 0)
			error = wait_for_stop(target->tid, &status);
		signal = WSTOPSIG(status) == SIGSTOP ? SIGSTOP : 0; /* sent again meanwhile: goes on its way */
	}
	if (error == 0)
		error = trace(PTRACE_SETREGS, target->tid, 0, &target->registers);
	if (error == 0)
		error = trace(PTRACE_SETSIGMASK, target->tid, sizeof(target->signal_mask), &target->signal_mask);
	return error;
}

static int map_scratch(struct target *target)
{
	const uint64_t arguments[6] = { 0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, UINT64_MAX, 0 };
	int64_t result;
	int error = call_in_target(target, SYS_mmap, arguments, &result);

	if (error == 0 && result < 0 && result >= -PAGE)
		error = (int)result;
	target->scratch = (uint64_t)result;
	return error;
}

static int unmap_scratch(const struct target *target)
{
	const uint64_t arguments[6] = { target->scratch, PAGE };
	int64_t result;
	int error = call_in_target(target, SYS_munmap, arguments, &result);

	return error < 0 ? error : (int)result;
}

static int apply(const struct target *target, const struct rw_policy *policy)
{
	const uint64_t bits = RW_NODE_WORDS * 64 + 1; /* the kernel takes one off */
	const uint64_t mode = (uint64_t)policy->mode;
	const uint64_t thread[6] = { mode, target->scratch, bits };
	const uint64_t range[6] = { policy->start, policy->length, mode, target->scratch, bits, policy->flags };
	int64_t result;
	int error = write_memory(target->tid, target->scratch, policy->nodes, sizeof(policy->nodes));

	if (error == 0 && policy->length == 0)
		error = call_in_target(target, SYS_set_mempolicy, thread, &result);
	else if (error == 0)
		error = call_in_target(target, SYS_mbind, range, &result);
	return error < 0 ? error : (int)result;
}

/* With every signal blocked; sets *failed as rw_set_policies does. */
static int apply_all(struct target *target, const struct rw_policy *policies, size_t count, size_t *failed)
{
	int error = map_scratch(target);
	int unmapped;

	if (error < 0)
		return error;
	for (size_t i = 0; error == 0 && i < count; i++) {
		error = apply(target, &policies[i]);
		if (error < 0)
			*failed = i;
	}
	unmapped = unmap_scratch(target);
	return error < 0 ? error : unmapped;
}

int rw_set_policies(int tid, const struct rw_policy *policies, size_t count, size_t *failed)
{
	struct target target = { .tid = tid };
	int error = seize(tid);
	int restored = 0;

	*failed = count;
	if (error < 0)
		return error;
	error = save(&target);
	if (error == 0) {
		error = block_signals(&target);
		if (error == 0)
			error = apply_all(&target, policies, count, failed);
		restored = restore(&target);
	}
	/* Not detached on purpose if the registers are not back: EXITKILL then ends the program with this thread's
	 * process, as rewarm never lets a process run that is not whole. */
	if (restored == 0)
		restored = trace_number(PTRACE_DETACH, tid, 0);
	return error < 0 ? error : restored;
}

#endif
