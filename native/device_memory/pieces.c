/* A handle is given back in every case: the driver's checkpoint saves the memory of one that is left.
 *
 * Nothing here waits for the device, whose work is over: the driver's lock has seen to that before the program was
 * stopped. To wait would be to wait for ever, where a stopped thread is inside the driver with one of its locks (seen with
 * 16 threads at work: cuMemFree did not come back). */
#include "pieces.h"
#include "change.h"
#include "created.h"
#include "device.h"

#include <errno.h>

struct handle {
	const struct rw_driver *driver;
	uint64_t value;
	bool held;
};

static void release(const struct handle *handle)
{
	if (handle->held)
		handle->driver->cuMemRelease(handle->value);
}

#define autorelease __attribute__((cleanup(release)))

static uint8_t state_of(const struct rw_piece *piece)
{
	return __atomic_load_n(piece->state, __ATOMIC_ACQUIRE);
}

static void set_state(const struct rw_piece *piece, uint8_t state)
{
	__atomic_store_n(piece->state, state, __ATOMIC_RELEASE);
}

static void set_away(const struct rw_piece *piece)
{
	set_state(piece, RW_AWAY);
	if (piece->allocation->created != NULL)
		rw_count_away(true);
}

/* This thread's own modes: calls that are unsafe in a capture are refused to it by no capture of another. */
static int set_context(const struct rw_driver *driver, void *context)
{
	static bool relaxed;
	int mode = CU_STREAM_CAPTURE_MODE_RELAXED;
	int result = driver->cuCtxSetCurrent(context);

	if (!relaxed)
		relaxed = driver->cuThreadExchangeStreamCaptureMode(&mode) == CUDA_SUCCESS;
	return result;
}

/* What a program has created is of no context: mappings outlive a reset of the primary one (measured, driver 580). */
static int enter(const struct rw_driver *driver, const struct rw_piece *piece)
{
	return set_context(driver, piece->allocation->created != NULL ? NULL : piece->allocation->context);
}

/* But a copy has to be in one. */
struct primary {
	const struct rw_driver *driver;
	int device;
	bool retained;
};

static int enter_primary(struct primary *primary, const struct rw_piece *piece)
{
	void *context;

	if (piece->allocation->created == NULL)
		return CUDA_SUCCESS;
	primary->device = (int)piece->allocation->device;
	int result = primary->driver->cuDevicePrimaryCtxRetain(&context, primary->device);
	primary->retained = result == CUDA_SUCCESS;
	return result != CUDA_SUCCESS ? result : set_context(primary->driver, context);
}

static void leave_primary(const struct primary *primary)
{
	if (!primary->retained)
		return;
	primary->driver->cuCtxSetCurrent(NULL);
	primary->driver->cuDevicePrimaryCtxRelease_v2(primary->device);
}

/* In a stream of its own, which no other thread can have locked. */
static int copy(const struct rw_driver *driver, uint64_t target, uint64_t source, size_t size)
{
	void *stream;
	int result = driver->cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING);

	if (result != CUDA_SUCCESS)
		return result;
	result = driver->cuMemcpyDtoDAsync_v2(target, source, size, stream);
	if (result == CUDA_SUCCESS)
		result = driver->cuStreamSynchronize(stream);
	driver->cuStreamDestroy_v2(stream);
	return result;
}

static int hold(struct handle *handle, const struct rw_piece *piece)
{
	int result = handle->driver->cuMemRetainAllocationHandle(&handle->value, (void *)(uintptr_t)piece->address);

	handle->held = result == CUDA_SUCCESS;
	return result;
}

/* As it was. */
static int set_access(const struct rw_driver *driver, const struct rw_piece *piece)
{
	const struct rw_allocation *allocation = piece->allocation;

	if (allocation->created == NULL)
		return rw_set_access(driver, allocation->device, piece->address, piece->size);
	if (allocation->access == CU_MEM_ACCESS_FLAGS_PROT_NONE)
		return CUDA_SUCCESS;
	return rw_set_peer_access(driver, allocation->device, piece->address, piece->size, allocation->access);
}

/* All or nothing. */
static int put(const struct handle *handle, const struct rw_piece *piece)
{
	int result = handle->driver->cuMemMap(piece->address, piece->size, 0, handle->value, 0);

	if (result != CUDA_SUCCESS)
		return result;
	result = set_access(handle->driver, piece);
	if (result != CUDA_SUCCESS)
		handle->driver->cuMemUnmap(piece->address, piece->size);
	return result;
}

/* Of one that the program has closed. */
static int change_access(const struct rw_driver *driver, const struct rw_piece *piece, int flags)
{
	const struct rw_allocation *allocation = piece->allocation;

	if (allocation->created == NULL || allocation->access != CU_MEM_ACCESS_FLAGS_PROT_NONE)
		return CUDA_SUCCESS;
	return rw_set_peer_access(driver, allocation->device, piece->address, piece->size, flags);
}

/* The memory of the piece into that of `handle`, by way of an address that nobody else knows. */
static int copy_to(const struct handle *handle, const struct rw_piece *piece)
{
	const struct rw_driver *driver = handle->driver;
	uint32_t device = piece->allocation->device;
	uint64_t scratch;
	int result = change_access(driver, piece, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);

	if (result == CUDA_SUCCESS)
		result = driver->cuMemAddressReserve(&scratch, piece->size, 0, 0, 0);
	if (result != CUDA_SUCCESS)
		return result;
	result = driver->cuMemMap(scratch, piece->size, 0, handle->value, 0);
	if (result == CUDA_SUCCESS) {
		result = rw_set_peer_access(driver, device, scratch, piece->size, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
		if (result == CUDA_SUCCESS)
			result = copy(driver, scratch, piece->address, piece->size);
		driver->cuMemUnmap(scratch, piece->size);
	}
	driver->cuMemAddressFree(scratch, piece->size);
	return result;
}

/* How many handles of the piece's memory the program has: all have one number. */
static uint32_t holds(const struct rw_piece *piece)
{
	return piece->allocation->created != NULL ? piece->allocation->created->holds : 0;
}

static int release_all(const struct rw_driver *driver, uint64_t handle, uint32_t count)
{
	int result = CUDA_SUCCESS;

	while (count-- > 0 && result == CUDA_SUCCESS)
		result = driver->cuMemRelease(handle);
	return result;
}

/* The program's handles are of this one from now on, which is mapped. */
static int hand_over(struct handle *handle, const struct rw_piece *piece)
{
	uint64_t same;
	int result = CUDA_SUCCESS;

	if (holds(piece) == 0)
		return CUDA_SUCCESS;
	piece->allocation->created->actual = handle->value;
	handle->held = false;
	for (uint32_t count = 1; count < holds(piece) && result == CUDA_SUCCESS; count++)
		result = handle->driver->cuMemRetainAllocationHandle(&same, (void *)(uintptr_t)piece->address);
	return result;
}

static struct rw_kind kind_of(const struct rw_piece *piece)
{
	struct rw_kind kind;

	if (piece->allocation->created == NULL)
		return rw_kind_of(piece->allocation->device);
	kind = piece->allocation->created->kind;
	kind.handle_types |= CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
	return kind;
}

int rw_own(const struct rw_piece *piece)
{
	const struct rw_driver *driver = rw_driver();
	__attribute__((cleanup(leave_primary))) struct primary primary = { .driver = driver };
	autorelease struct handle new = { .driver = driver }, old = { .driver = driver };
	struct rw_kind kind = kind_of(piece);

	if (state_of(piece) & RW_AWAY)
		return -ENOENT;
	if ((state_of(piece) & RW_IMPORTED) == 0)
		return CUDA_SUCCESS;
	int result = enter(driver, piece);
	if (result == CUDA_SUCCESS)
		result = hold(&old, piece);
	if (result == CUDA_SUCCESS) {
		result = driver->cuMemCreate(&new.value, piece->size, &kind, 0);
		new.held = result == CUDA_SUCCESS;
	}
	if (result == CUDA_SUCCESS)
		result = enter_primary(&primary, piece);
	if (result == CUDA_SUCCESS)
		result = copy_to(&new, piece);
	if (result == CUDA_SUCCESS)
		result = driver->cuMemUnmap(piece->address, piece->size);
	if (result != CUDA_SUCCESS) {
		change_access(driver, piece, CU_MEM_ACCESS_FLAGS_PROT_NONE);
		return result;
	}
	result = put(&new, piece);
	if (result == CUDA_SUCCESS) {
		uint64_t before = holds(piece) > 0 ? piece->allocation->created->actual : 0;

		set_state(piece, 0);
		result = hand_over(&new, piece);
		return result != CUDA_SUCCESS ? result : release_all(driver, before, holds(piece));
	}
	if (put(&old, piece) != CUDA_SUCCESS)
		set_away(piece);
	return result;
}

int rw_export(const struct rw_piece *piece, int *descriptor)
{
	const struct rw_driver *driver = rw_driver();
	autorelease struct handle handle = { .driver = driver };

	if (state_of(piece) & RW_AWAY)
		return -ENOENT;
	int result = enter(driver, piece);
	if (result == CUDA_SUCCESS)
		result = hold(&handle, piece);
	/* The handle of an address is the one that was mapped (CUDA driver API, cuMemRetainAllocationHandle): else something was
	 * mapped there by a call that was not seen. */
	if (result == CUDA_SUCCESS && holds(piece) > 0 && handle.value != piece->allocation->created->actual)
		return -ESTALE;
	if (result == CUDA_SUCCESS)
		result = driver->cuMemExportToShareableHandle(descriptor, handle.value, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
	return result;
}

int rw_unmap(const struct rw_piece *piece)
{
	const struct rw_driver *driver = rw_driver();

	if (state_of(piece) & RW_AWAY)
		return CUDA_SUCCESS;
	int result = enter(driver, piece);
	if (result == CUDA_SUCCESS)
		result = driver->cuMemUnmap(piece->address, piece->size);
	if (result != CUDA_SUCCESS)
		return result;
	set_away(piece);
	return release_all(driver, holds(piece) > 0 ? piece->allocation->created->actual : 0, holds(piece));
}

int rw_map(const struct rw_piece *piece, int descriptor)
{
	const struct rw_driver *driver = rw_driver();
	autorelease struct handle handle = { .driver = driver };

	if ((state_of(piece) & RW_AWAY) == 0)
		return CUDA_SUCCESS;
	if (descriptor < 0)
		return -EBADF;
	int result = enter(driver, piece);
	if (result == CUDA_SUCCESS) {
		result = driver->cuMemImportFromShareableHandle(&handle.value, (void *)(uintptr_t)descriptor,
								CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
		handle.held = result == CUDA_SUCCESS;
	}
	if (result == CUDA_SUCCESS)
		result = put(&handle, piece);
	if (result != CUDA_SUCCESS)
		return result;
	set_state(piece, RW_IMPORTED);
	result = hand_over(&handle, piece);
	if (piece->allocation->created != NULL)
		rw_count_away(false);
	return result;
}
