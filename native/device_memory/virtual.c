/* What a program creates by CUDA's virtual memory API itself (vLLM's sleep mode, torch_memory_saver, PyTorch's expandable
 * segments) is served like what it allocates (created.h). The calls are the program's own, with another handle at most, and
 * with one thing more: memory is made so that it can be exported. */
#include "virtual.h"
#include "change.h"
#include "control.h"
#include "created.h"
#include "device.h"
#include "real.h"
#include "serve.h"

RW_VIRTUAL(INTERPOSE)

#define FOUND(handle) \
	__attribute__((cleanup(rw_drop_found))) struct rw_created *const found = rw_find_created(handle)

static bool can_serve(size_t size, const struct rw_kind *kind, uint64_t flags)
{
	if (kind == NULL || size < RW_LEAST || flags != 0 || kind->type != CU_MEM_ALLOCATION_TYPE_PINNED ||
	    (kind->handle_types & ~CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) != 0 ||
	    kind->location.type != CU_MEM_LOCATION_TYPE_DEVICE || kind->location.id < 0 ||
	    kind->location.id >= RW_DEVICES || kind->windows != NULL || kind->compression != 0 || kind->usage != 0)
		return false;
	const struct rw_driver *driver = rw_serving() ? rw_find_driver() : NULL;
	if (driver == NULL || !rw_is_alone_with_driver())
		return false;
	size_t granularity = rw_granularity(driver, (uint32_t)kind->location.id);
	return granularity != 0 && granularity % RW_LEAST == 0 && size % granularity == 0 && rw_control_start();
}

/* What the driver has just made gets its name, or goes. */
static int name(uint64_t *handle, size_t size, const struct rw_kind *kind)
{
	if (rw_name(handle, size, kind))
		return CUDA_SUCCESS;
	real_cuMemRelease(*handle);
	return CUDA_ERROR_OUT_OF_MEMORY;
}

INTERPOSED int cuMemCreate(uint64_t *handle, size_t size, const struct rw_kind *kind, uint64_t flags)
{
	RW_CALL;
	if (handle != NULL && can_serve(size, kind, flags)) {
		struct rw_kind exportable = *kind;

		exportable.handle_types |= CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
		int result = real_cuMemCreate(handle, size, &exportable, 0);
		if (result == CUDA_SUCCESS)
			return name(handle, size, kind);
		if (result == CUDA_ERROR_OUT_OF_MEMORY)
			return result;
	}
	int result = real_cuMemCreate(handle, size, kind, flags);
	return result != CUDA_SUCCESS ? result : name(handle, 0, NULL);
}

INTERPOSED int cuMemRelease(uint64_t handle)
{
	RW_CALL;
	FOUND(handle);
	if (found == NULL)
		return real_cuMemRelease(handle);
	int result = real_cuMemRelease(found->actual);
	if (result == CUDA_SUCCESS)
		rw_released(found);
	return result;
}

INTERPOSED int cuMemMap(uint64_t address, size_t size, size_t offset, uint64_t handle, uint64_t flags)
{
	RW_CALL;
	FOUND(handle);
	if (found == NULL)
		return real_cuMemMap(address, size, offset, handle, flags);
	int result = real_cuMemMap(address, size, offset, found->actual, flags);
	if (result != CUDA_SUCCESS)
		return result;
	if (offset == 0 && size == found->size && flags == 0 && address % RW_LEAST == 0)
		rw_mapped(found, address, size);
	else
		rw_leave_created(found);
	return result;
}

INTERPOSED int cuMemUnmap(uint64_t address, size_t size)
{
	RW_CALL;
	/* Another thread may map something there as soon as it is free. */
	struct rw_allocation *entries = rw_take_out_created(address, size);
	int result = real_cuMemUnmap(address, size);
	rw_unmapped(entries, result == CUDA_SUCCESS);
	return result;
}

INTERPOSED int cuMemSetAccess(uint64_t address, size_t size, const struct rw_access *access, size_t count)
{
	RW_CALL;
	int result = real_cuMemSetAccess(address, size, access, count);
	if (result != CUDA_SUCCESS)
		return result;
	/* When memory comes back, it is for its own device. */
	if (count != 1 || access->location.type != CU_MEM_LOCATION_TYPE_DEVICE ||
	    !rw_note_access(address, size, access->location.id, access->flags))
		rw_leave(rw_take_out_created(address, size));
	return result;
}

/* What the library has allocated has no handle, as what it stands for. */
INTERPOSED int cuMemRetainAllocationHandle(uint64_t *handle, void *address)
{
	RW_CALL;
	uint64_t start, asked;
	int result = real_cuMemRetainAllocationHandle(handle, address);
	if (result != CUDA_SUCCESS)
		return result;
	bool allocated = rw_around((uintptr_t)address, &start, &asked);
	if (!allocated && rw_name_again(handle, (uintptr_t)address))
		return CUDA_SUCCESS;
	real_cuMemRelease(*handle);
	return allocated ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_OUT_OF_MEMORY;
}

/* What another process has, too, cannot be taken out of this one. */
INTERPOSED int cuMemExportToShareableHandle(void *shared, uint64_t handle, int type, uint64_t flags)
{
	RW_CALL;
	FOUND(handle);
	if (found == NULL)
		return real_cuMemExportToShareableHandle(shared, handle, type, flags);
	if (found->size > 0 && (found->kind.handle_types & type) == 0)
		return CUDA_ERROR_INVALID_VALUE; /* as the program has made it */
	int result = real_cuMemExportToShareableHandle(shared, found->actual, type, flags);
	if (result == CUDA_SUCCESS)
		rw_leave_created(found);
	return result;
}

INTERPOSED int cuMemImportFromShareableHandle(uint64_t *handle, void *shared, int type)
{
	RW_CALL;
	int result = real_cuMemImportFromShareableHandle(handle, shared, type);
	return result != CUDA_SUCCESS ? result : name(handle, 0, NULL);
}

INTERPOSED int cuMemGetAllocationPropertiesFromHandle(struct rw_kind *kind, uint64_t handle)
{
	RW_CALL;
	FOUND(handle);
	int result = real_cuMemGetAllocationPropertiesFromHandle(kind, found == NULL ? handle : found->actual);
	/* The driver says other things of memory that was imported. */
	if (result == CUDA_SUCCESS && found != NULL && found->size > 0)
		*kind = found->kind;
	return result;
}

INTERPOSED int cuMulticastCreate(uint64_t *handle, const void *kind)
{
	RW_CALL;
	int result = real_cuMulticastCreate(handle, kind);
	if (result != CUDA_SUCCESS || !rw_is_name(*handle))
		return result;
	/* That is for memory only, in what takes both. */
	real_cuMemRelease(*handle);
	return CUDA_ERROR_OUT_OF_MEMORY;
}

INTERPOSED int cuMulticastBindMem(uint64_t multicast, size_t offset, uint64_t handle, size_t from, size_t size,
				  uint64_t flags)
{
	RW_CALL;
	FOUND(handle);
	if (found != NULL)
		rw_leave_created(found);
	return real_cuMulticastBindMem(multicast, offset, found == NULL ? handle : found->actual, from, size, flags);
}

INTERPOSED int cuMulticastBindAddr(uint64_t multicast, size_t offset, uint64_t address, size_t size, uint64_t flags)
{
	RW_CALL;
	rw_leave(rw_take_out_created(address, size));
	return real_cuMulticastBindAddr(multicast, offset, address, size, flags);
}

INTERPOSED int cuMulticastBindMem_v2(uint64_t multicast, int device, size_t offset, uint64_t handle, size_t from,
				     size_t size, uint64_t flags)
{
	RW_CALL;
	FOUND(handle);
	if (found != NULL)
		rw_leave_created(found);
	handle = found == NULL ? handle : found->actual;
	return real_cuMulticastBindMem_v2(multicast, device, offset, handle, from, size, flags);
}

INTERPOSED int cuMulticastBindAddr_v2(uint64_t multicast, int device, size_t offset, uint64_t address, size_t size,
				      uint64_t flags)
{
	RW_CALL;
	rw_leave(rw_take_out_created(address, size));
	return real_cuMulticastBindAddr_v2(multicast, device, offset, address, size, flags);
}
