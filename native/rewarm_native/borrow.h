/* Borrowing a thread of another process for system calls that Linux lets a process make only for itself. */
#ifndef REWARM_BORROW_H
#define REWARM_BORROW_H

#include "native.h"

#include <sys/types.h>
#ifdef __x86_64__
#include <sys/user.h>

struct borrowed {
	pid_t tid;
	uint64_t instruction; /* address of a `syscall` in the target */
	uint64_t signal_mask;
	struct user_regs_struct registers;
};
#else
struct borrowed;
#endif

/* Runs `work`, which is given `argument`, while every signal is blocked in the thread `tid`, and returns what it returns;
 * -errno if the thread cannot be made to run anything. Afterwards the thread is as it was. */
int rw_borrow(int tid, int (*work)(struct borrowed *thread, void *argument), void *argument);

/* For `work`: one system call in the borrowed thread. Returns 0 and sets *result to what the call returned (an error of
 * the call's own included), or -errno. */
int rw_call(const struct borrowed *thread, uint64_t number, const uint64_t arguments[6], int64_t *result);

#endif
