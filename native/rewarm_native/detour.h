/* A system call that a traced thread makes on a way of its own: whatever happens to its tracer once it is sent there,
 * it comes back with the registers, the floating point state and the signal mask that it had. */
#ifndef REWARM_DETOUR_H
#define REWARM_DETOUR_H

#include "native.h"

#include <stdbool.h>
#include <sys/types.h>

/* Finds what the detours of a thread need in the code of its process. Returns 0 or -errno. */
int rw_find_way(pid_t tid, struct rw_way *way);

/* Sends the thread, which is in the stop at the end of a system call, to another: number and arguments, those beyond
 * being whatever they are. Sets *stack to its stack pointer at that call. Returns -errno, and has changed nothing that counts,
 * when that cannot be done. */
int rw_send(pid_t tid, const struct rw_way *way, uint64_t number, const uint64_t arguments[3], uint64_t *stack);

/* Whether a system call is one that the thread makes on its detour: the stack pointer is relative to rw_send's. */
bool rw_is_detour(uint64_t call, uint64_t number, uint64_t stack);

#endif
