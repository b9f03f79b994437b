#include "change.h"
#include "lock.h"

#include <limits.h>

enum { SLICE_NS = 100 * 1000 * 1000 };

static uint32_t changing, away;

void rw_begin_change(void)
{
	__atomic_add_fetch(&changing, 1, __ATOMIC_SEQ_CST);
}

void rw_end_change(const int *nothing)
{
	(void)nothing;
	__atomic_sub_fetch(&changing, 1, __ATOMIC_SEQ_CST);
}

uint32_t rw_changing(void)
{
	return __atomic_load_n(&changing, __ATOMIC_SEQ_CST);
}

/* Nothing is taken from a program that is counted: what is not away then stays until the end of the call. */
void rw_begin_call(void)
{
	const struct timespec slice = { .tv_nsec = SLICE_NS };
	uint32_t seen;
	int saved = errno;

	for (;;) {
		rw_begin_change();
		seen = __atomic_load_n(&away, __ATOMIC_SEQ_CST);
		if (seen == 0)
			break;
		rw_end_change(NULL);
		syscall(SYS_futex, &away, FUTEX_WAIT_PRIVATE, seen, &slice);
	}
	errno = saved;
}

void rw_count_away(bool more)
{
	if (more)
		__atomic_add_fetch(&away, 1, __ATOMIC_SEQ_CST);
	else if (__atomic_sub_fetch(&away, 1, __ATOMIC_SEQ_CST) == 0)
		syscall(SYS_futex, &away, FUTEX_WAKE_PRIVATE, INT_MAX, NULL);
}

void rw_forget_changes(void)
{
	changing = away = 0;
}
