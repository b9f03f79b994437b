/* ptrace(2) without what every use of it would have to say again. Functions return -errno on failure. */
#ifndef REWARM_TRACING_H
#define REWARM_TRACING_H

#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ptrace.h>
#include <sys/types.h>

enum {
	RW_SYSCALL_STOP = SIGTRAP | 0x80, /* by PTRACE_O_TRACESYSGOOD */
	RW_USER_CODE_64 = 0x33,           /* the code segment of 64-bit programs */
};

/* ptrace(2) with the types that its wrapper in glibc hides. */
int rw_trace(enum __ptrace_request request, pid_t tid, uintptr_t address, const void *data);
int rw_trace_number(enum __ptrace_request request, pid_t tid, uintptr_t number);

/* Waits for a stop, at most 2 s: a thread that is stuck in the kernel must not take the caller with it. -ESRCH when the
 * thread has ended. */
int rw_wait_for_stop(pid_t tid, int *status);

/* Called again and again until it returns something else: makes short pauses, then longer ones. -ETIMEDOUT after 2 s. */
int rw_pause(int tries);

int rw_read_memory(pid_t tid, uint64_t address, void *buffer, size_t size);
int rw_write_memory(pid_t tid, uint64_t address, const void *buffer, size_t size);

/* Sets *address to where executable memory holds the `size` bytes of `code`. `names`, up to NULL, are parts of the
 * lines of /proc/PID/maps in which it is looked for, in this order. -ENOEXEC if there are none. */
int rw_find_code(pid_t tid, const void *code, size_t size, const char *const *names, uint64_t *address);

#endif
