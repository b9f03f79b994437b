/* NUMA memory policies for another process, by a borrowed thread of it (borrow.c).
 *
 * The node masks lie in a page that the target maps for it and unmaps again: its stack may be small, foreign or full,
 * and is left alone.
 */
#include "borrow.h"
#include "tracing.h"

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

#include <sys/mman.h>
#include <sys/syscall.h>

enum { POLICY_PAGE = 4096 };

/* The thread, and a page of its process for arguments. */
struct setting {
	const struct borrowed *thread;
	uint64_t scratch;
};

static int map_scratch(struct setting *setting)
{
	const uint64_t arguments[6] = { 0, POLICY_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, UINT64_MAX, 0 };
	int64_t result;
	int error = rw_call(setting->thread, SYS_mmap, arguments, &result);

	if (error == 0 && result < 0 && result >= -POLICY_PAGE)
		error = (int)result;
	setting->scratch = (uint64_t)result;
	return error;
}

static int unmap_scratch(const struct setting *setting)
{
	const uint64_t arguments[6] = { setting->scratch, POLICY_PAGE };
	int64_t result;
	int error = rw_call(setting->thread, SYS_munmap, arguments, &result);

	return error < 0 ? error : (int)result;
}

static int apply(const struct setting *setting, const struct rw_policy *policy)
{
	const uint64_t bits = RW_NODE_WORDS * 64 + 1; /* the kernel takes one off */
	const uint64_t mode = (uint64_t)policy->mode;
	const uint64_t thread[6] = { mode, setting->scratch, bits };
	const uint64_t range[6] = { policy->start, policy->length, mode, setting->scratch, bits, policy->flags };
	int64_t result;
	int error = rw_write_memory(setting->thread->tid, setting->scratch, policy->nodes, sizeof(policy->nodes));

	if (error == 0 && policy->length == 0)
		error = rw_call(setting->thread, SYS_set_mempolicy, thread, &result);
	else if (error == 0)
		error = rw_call(setting->thread, SYS_mbind, range, &result);
	return error < 0 ? error : (int)result;
}

struct policies {
	const struct rw_policy *items;
	size_t count;
	size_t *failed; /* as rw_set_policies has it */
};

static int apply_all(struct borrowed *thread, void *argument)
{
	const struct policies *policies = argument;
	struct setting setting = { .thread = thread };
	int error = map_scratch(&setting);
	int unmapped;

	if (error < 0)
		return error;
	for (size_t i = 0; error == 0 && i < policies->count; i++) {
		error = apply(&setting, &policies->items[i]);
		if (error < 0)
			*policies->failed = i;
	}
	unmapped = unmap_scratch(&setting);
	return error < 0 ? error : unmapped;
}

int rw_set_policies(int tid, const struct rw_policy *policies, size_t count, size_t *failed)
{
	struct policies all = { policies, count, failed };

	*failed = count;
	return rw_borrow(tid, apply_all, &all);
}

#endif
