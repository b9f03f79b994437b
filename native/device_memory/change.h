/* Calls that have begun to change what is mapped, and have not told the tables yet, or the other way round. A thread that
 * was stopped in one is counted, so that who wants to take the memory sees that this is not the moment. */
#ifndef REWARM_DEVICE_MEMORY_CHANGE_H
#define REWARM_DEVICE_MEMORY_CHANGE_H

#include <stdint.h>

extern uint32_t rw_change_count;

static inline void rw_end_change(const int *nothing)
{
	(void)nothing;
	__atomic_sub_fetch(&rw_change_count, 1, __ATOMIC_ACQ_REL);
}

/* Until the end of the block. */
#define RW_CHANGE                                                             \
	__attribute__((cleanup(rw_end_change), unused)) const int change = 0; \
	__atomic_add_fetch(&rw_change_count, 1, __ATOMIC_ACQ_REL)

#endif
