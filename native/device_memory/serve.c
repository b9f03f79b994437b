/* No lock is held over a call of CUDA. A thread that stands still in the middle of one of these leaves memory that the
 * table does not know (not yet, or no more): that goes the driver's way.
 *
 * cuMemUnmap does not wait for work that uses the memory, which then fails for the whole context (measured, driver 580:
 * error 700). cuMemFree waits, even beside the captures of other threads, which cuCtxSynchronize would break. So every
 * allocation has a tag, a few bytes of the driver's own, and is freed by freeing its tag first: the wait, the rules for
 * captures and the errors of a free are the driver's (measured equal in all modes; 7 us for a tag and its end). */
#include "serve.h"
#include "change.h"
#include "control.h"
#include "device.h"
#include "table.h"

#include <stdlib.h>

enum { TAG = 256 };

static bool stopped;

bool rw_serving(void)
{
	return !__atomic_load_n(&stopped, __ATOMIC_RELAXED);
}

void rw_stop_serving(void)
{
	__atomic_store_n(&stopped, true, __ATOMIC_RELAXED);
}

static int wait_for(const struct rw_driver *driver, void *context)
{
	void *current = NULL;

	if (driver->cuCtxGetCurrent(&current) == CUDA_SUCCESS && current == context)
		return driver->cuCtxSynchronize();
	int result = driver->cuCtxPushCurrent_v2(context);
	if (result != CUDA_SUCCESS)
		return result;
	result = driver->cuCtxSynchronize();
	driver->cuCtxPopCurrent_v2(&current);
	return result;
}

static int unmap_pieces(const struct rw_driver *driver, const struct rw_allocation *allocation, uint32_t count)
{
	int first = CUDA_SUCCESS;

	for (uint32_t index = 0; index < count; index++) {
		if (__atomic_load_n(&allocation->state[index], __ATOMIC_ACQUIRE) & RW_AWAY)
			continue;
		int result = driver->cuMemUnmap(allocation->address + index * RW_PIECE, rw_piece_size(allocation, index));
		if (first == CUDA_SUCCESS)
			first = result;
	}
	return first;
}

static int take_apart(const struct rw_driver *driver, struct rw_allocation *allocation)
{
	rw_take_out(allocation);
	int result = unmap_pieces(driver, allocation, allocation->pieces);
	/* An address with memory behind it must not be given out again. */
	if (result == CUDA_SUCCESS)
		result = driver->cuMemAddressFree(allocation->address, allocation->size);
	free(allocation);
	return result;
}

static int back_piece(const struct rw_driver *driver, const struct rw_allocation *allocation, uint32_t index)
{
	struct rw_kind kind = rw_kind_of(allocation->device);
	uint64_t handle, size = rw_piece_size(allocation, index);

	int result = driver->cuMemCreate(&handle, size, &kind, 0);
	if (result != CUDA_SUCCESS)
		return result;
	result = driver->cuMemMap(allocation->address + index * RW_PIECE, size, 0, handle, 0);
	/* The mapping keeps the memory, and what is held beyond it would stay behind when the program frees it. */
	driver->cuMemRelease(handle);
	return result;
}

static bool back(const struct rw_driver *driver, struct rw_allocation *allocation)
{
	RW_CHANGE;
	uint32_t done = 0;

	if (driver->cuMemAddressReserve(&allocation->address, allocation->size, 0, 0, 0) != CUDA_SUCCESS)
		return false;
	rw_anchor(driver, allocation->device);
	while (done < allocation->pieces && back_piece(driver, allocation, done) == CUDA_SUCCESS)
		done++;
	if (done == allocation->pieces && driver->cuMemAlloc_v2(&allocation->tag, TAG) == CUDA_SUCCESS) {
		uint64_t accessors = rw_accessors(allocation->device);

		if (rw_set_access(driver, allocation->device, allocation->address, allocation->size) == CUDA_SUCCESS &&
		    rw_insert(allocation)) {
			/* A peer that came or went meanwhile did not see this one. */
			uint64_t changed = accessors ^ rw_accessors(allocation->device);

			for (uint32_t peer = 0; peer < RW_DEVICES; peer++)
				if (changed >> peer & 1)
					rw_change_peer(allocation->device, peer, (accessors >> peer & 1) == 0);
			return true;
		}
		driver->cuMemFree_v2(allocation->tag);
	}
	unmap_pieces(driver, allocation, done);
	driver->cuMemAddressFree(allocation->address, allocation->size);
	return false;
}

bool rw_serve(uint64_t *address, size_t size)
{
	const struct rw_driver *driver = rw_find_driver();
	void *context = NULL;
	int device = -1;

	if (!rw_serving() || driver == NULL || driver->cuCtxGetCurrent(&context) != CUDA_SUCCESS || context == NULL ||
	    driver->cuCtxGetDevice(&device) != CUDA_SUCCESS || device < 0 || device >= RW_DEVICES ||
	    !rw_is_primary(driver, (uint32_t)device, context))
		return false;
	size_t granularity = rw_granularity(driver, (uint32_t)device);
	if (granularity == 0 || RW_PIECE % granularity != 0 || size > SIZE_MAX / 2 || !rw_control_start())
		return false;
	struct rw_allocation *new = rw_new_allocation((size + granularity - 1) / granularity * granularity);
	if (new == NULL)
		return false;
	new->asked = size;
	new->context = context;
	new->device = (uint32_t)device;
	if (!back(driver, new)) {
		free(new);
		return false;
	}
	*address = new->address;
	return true;
}

int rw_free(uint64_t address, int (*free_tag)(uint64_t))
{
	RW_CHANGE;
	const struct rw_driver *driver = rw_driver();
	struct rw_allocation *found = driver == NULL || address == 0 ? NULL : rw_begin_free(address);

	if (found == NULL)
		return RW_NOT_OURS;
	int result = free_tag(found->tag);
	if (result == CUDA_SUCCESS)
		return take_apart(driver, found);
	rw_end_free(found);
	return result;
}

void rw_free_device(uint32_t device)
{
	const struct rw_driver *driver = rw_driver();
	RW_CHANGE;
	struct rw_allocation *one;
	bool waited = false;

	if (driver == NULL || device >= RW_DEVICES)
		return;
	while ((one = rw_begin_free_of(device)) != NULL) {
		/* Whatever it says: a broken context is what a reset is for. The tags go with the context. */
		if (!waited)
			wait_for(driver, one->context);
		waited = true;
		take_apart(driver, one);
	}
	rw_forget_device(device);
}

int rw_change_peer(uint32_t owner, uint32_t peer, bool access)
{
	const struct rw_driver *driver = rw_driver();
	int flags = access ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_NONE, first = CUDA_SUCCESS;
	size_t count;

	if (driver == NULL)
		return CUDA_SUCCESS;
	struct rw_allocation **all = rw_hold_all(owner, &count);
	for (size_t at = 0; at < count; at++) {
		struct rw_allocation *one = all[at];

		for (uint32_t index = 0; index < one->pieces; index++) {
			if (__atomic_load_n(&one->state[index], __ATOMIC_ACQUIRE) & RW_AWAY)
				continue; /* it gets its access when it comes back */
			int result = rw_set_peer_access(driver, peer, one->address + index * RW_PIECE, rw_piece_size(one, index), flags);
			if (first == CUDA_SUCCESS)
				first = result;
		}
		rw_let_go(one);
	}
	free(all);
	return first;
}
