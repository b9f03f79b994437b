/* Calls that have begun to change what is mapped, and have not told the tables yet, or the other way round. A thread that
 * was stopped in one is counted, so that who wants to take the memory sees that this is not the moment. */
#ifndef REWARM_DEVICE_MEMORY_CHANGE_H
#define REWARM_DEVICE_MEMORY_CHANGE_H

#include <stdbool.h>
#include <stdint.h>

void rw_begin_change(void);
void rw_end_change(const int *nothing);

/* The same for calls with a handle of the program's: while memory that it has created is away, which is when the driver
 * would keep them waiting, they wait here. The handle that they would bring is no more, and the table is what a restore
 * goes by. */
void rw_begin_call(void);

/* Until the end of the block. */
#define RW_CHANGE                                                             \
	__attribute__((cleanup(rw_end_change), unused)) const int change = 0; \
	rw_begin_change()
#define RW_CALL                                                             \
	__attribute__((cleanup(rw_end_change), unused)) const int change = 0; \
	rw_begin_call()

/* How many there are. */
uint32_t rw_changing(void);

/* A piece that the program has created goes away or is back, while the program stands still. */
void rw_count_away(bool more);

/* In the child of a fork. */
void rw_forget_changes(void);

#endif
