/* A lock for moments, with a limit for who must not wait for a thread that was stopped from outside. By futex(2), since
 * glibc before 2.34 has its locks in a library that may not be there. */
#ifndef REWARM_DEVICE_MEMORY_LOCK_H
#define REWARM_DEVICE_MEMORY_LOCK_H

#include <errno.h>
#include <linux/futex.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct rw_lock {
	int word;
};

enum { RW_FREE, RW_HELD, RW_AWAITED };

/* False after about `limit_ms`; never if that is negative. */
static inline bool rw_lock_within(struct rw_lock *lock, int limit_ms)
{
	struct timespec slice = { .tv_nsec = 10 * 1000 * 1000 };
	int free = RW_FREE, saved = errno;

	if (__atomic_compare_exchange_n(&lock->word, &free, RW_HELD, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
		return true;
	while (__atomic_exchange_n(&lock->word, RW_AWAITED, __ATOMIC_ACQUIRE) != RW_FREE) {
		long failed = syscall(SYS_futex, &lock->word, FUTEX_WAIT_PRIVATE, RW_AWAITED, limit_ms < 0 ? NULL : &slice);

		if (failed != 0 && errno == ETIMEDOUT && (limit_ms -= 10) <= 0) {
			errno = saved;
			return false;
		}
	}
	errno = saved;
	return true;
}

static inline void rw_unlock(struct rw_lock *lock)
{
	if (__atomic_exchange_n(&lock->word, RW_FREE, __ATOMIC_RELEASE) == RW_AWAITED)
		syscall(SYS_futex, &lock->word, FUTEX_WAKE_PRIVATE, 1, NULL);
}

#endif
