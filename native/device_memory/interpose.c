/* rewarm-device-memory.so: preloaded, it serves device memory of 2 MiB and more from CUDA's virtual memory API, so that
 * the memory can be taken out of the process and brought back at the same addresses. What a process outside can do to
 * it: protocol.h. Nothing happens in a process before its first such allocation.
 *
 * The functions below stand in front of CUDA's own. They see calls that go through the dynamic linker. This goes the
 * driver's way, as if the library were not there:
 *
 *     - allocations below 2 MiB; cudaMallocPitch, 3D, Array, Managed, Host, Async, and all memory pools
 *     - what a program creates with cuMemCreate itself, as long as it is not mapped; for good once it was mapped twice
 *       or in part, for several devices, bound to a multicast group, or exported
 *     - calls of a CUDA runtime that is linked statically (nvcc's default), or of addresses that the program has got
 *       by dlsym(3) of a handle; or by cudaGetDriverEntryPoint or cuGetProcAddress, but for those in virtual.h
 *     - allocations in another context than the device's primary one, of a device that cannot export its memory, of the
 *       65th device on, and all in the child of a fork
 *     - allocations that another library, behind this one, stands in front of as well: of cudaMalloc, or of the driver's
 *       cuMemAlloc or cuMemCreate, also by a dlsym of its own; it is asked once, at the first large allocation
 *     - everything after a wish for a legacy IPC handle of such memory, which has none
 *
 * Seen by a program: sizes are rounded up to 2 MiB, and 2 MiB more are taken until the context goes. cudaFreeAsync of such
 * memory waits for the device. A range that cuPointerGetAttribute gives ends at a GiB from its start.
 * cuDevicePrimaryCtxRelease does not free the memory.
 */
#include "device.h"
#include "real.h"
#include "serve.h"
#include "table.h"

#include <string.h>
#include <unistd.h>

INTERPOSE(cudaMalloc, (void **pointer, size_t size), (pointer, size))
INTERPOSE(cudaFree, (void *pointer), (pointer))
INTERPOSE(cudaFreeAsync, (void *pointer, void *stream), (pointer, stream))
INTERPOSE(cudaFreeAsync_ptsz, (void *pointer, void *stream), (pointer, stream))
INTERPOSE(cudaIpcGetMemHandle, (void *handle, void *pointer), (handle, pointer))
INTERPOSE(cudaDeviceEnablePeerAccess, (int peer, unsigned flags), (peer, flags))
INTERPOSE(cudaDeviceDisablePeerAccess, (int peer), (peer))
INTERPOSE(cudaDeviceReset, (void), ())
INTERPOSE(cuMemAlloc_v2, (uint64_t *pointer, size_t size), (pointer, size))
INTERPOSE(cuMemFree_v2, (uint64_t pointer), (pointer))
INTERPOSE(cuMemFreeAsync, (uint64_t pointer, void *stream), (pointer, stream))
INTERPOSE(cuMemFreeAsync_ptsz, (uint64_t pointer, void *stream), (pointer, stream))
INTERPOSE(cuMemGetAddressRange_v2, (uint64_t *base, size_t *size, uint64_t pointer), (base, size, pointer))
INTERPOSE(cuIpcGetMemHandle, (void *handle, uint64_t pointer), (handle, pointer))
INTERPOSE(cuCtxEnablePeerAccess, (void *peer, unsigned flags), (peer, flags))
INTERPOSE(cuCtxDisablePeerAccess, (void *peer), (peer))
INTERPOSE(cuDevicePrimaryCtxReset, (int device), (device))
INTERPOSE(cuDevicePrimaryCtxReset_v2, (int device), (device))
REAL(cudaGetDevice, NULL, (int *device), (device))

static uint64_t number(const void *pointer)
{
	return (uintptr_t)pointer;
}

static int free_by_runtime(uint64_t address)
{
	return real_cudaFree((void *)(uintptr_t)address);
}

static bool has_context(void)
{
	const struct rw_driver *driver = rw_find_driver();
	void *context = NULL;

	return driver != NULL && driver->cuCtxGetCurrent(&context) == CUDA_SUCCESS && context != NULL;
}

/* The runtime makes its contexts when it first needs them, and cudaSetDevice alone did not switch before CUDA 12. */
static bool runtime_is_ready(void)
{
	int wanted, device;

	if (!has_context() && (real_cudaFree(NULL) != CUDA_SUCCESS || !has_context()))
		return false;
	const struct rw_driver *driver = rw_find_driver();
	if (real_cudaGetDevice(&wanted) != CUDA_SUCCESS || driver->cuCtxGetDevice(&device) != CUDA_SUCCESS)
		return false;
	if (device == wanted)
		return true;
	return real_cudaFree(NULL) == CUDA_SUCCESS && driver->cuCtxGetDevice(&device) == CUDA_SUCCESS && device == wanted;
}

INTERPOSED int cudaMalloc(void **pointer, size_t size)
{
	uint64_t address;

	/* Who stands in front is asked once a runtime is there: some load it when they are first called. Where the answer is
	 * known, nothing is asked of the runtime. */
	if (pointer == NULL || size < RW_LEAST || !rw_serving() || rw_is_not_alone() || !runtime_is_ready() ||
	    !rw_is_alone_with_runtime() || !rw_is_alone_with_driver() || !rw_serve(&address, size))
		return real_cudaMalloc(pointer, size);
	*pointer = (void *)(uintptr_t)address;
	return CUDA_SUCCESS;
}

INTERPOSED int cuMemAlloc_v2(uint64_t *pointer, size_t size)
{
	uint64_t address;

	if (pointer == NULL || size < RW_LEAST || !rw_serving() || rw_find_driver() == NULL || !rw_is_alone_with_driver() ||
	    !rw_serve(&address, size))
		return real_cuMemAlloc_v2(pointer, size);
	*pointer = address;
	return CUDA_SUCCESS;
}

INTERPOSED int cudaFree(void *pointer)
{
	int result = rw_free(number(pointer), free_by_runtime);

	return result == RW_NOT_OURS ? real_cudaFree(pointer) : result;
}

INTERPOSED int cuMemFree_v2(uint64_t pointer)
{
	int result = rw_free(pointer, real_cuMemFree_v2);

	return result == RW_NOT_OURS ? real_cuMemFree_v2(pointer) : result;
}

/* CUDA allows these for memory of cudaMalloc, which is then free once the stream is done (CUDA programming guide,
 * stream-ordered memory allocator). Waiting for it is correct. */
INTERPOSED int cudaFreeAsync(void *pointer, void *stream)
{
	int result = rw_free(number(pointer), free_by_runtime);

	return result == RW_NOT_OURS ? real_cudaFreeAsync(pointer, stream) : result;
}

INTERPOSED int cudaFreeAsync_ptsz(void *pointer, void *stream)
{
	int result = rw_free(number(pointer), free_by_runtime);

	return result == RW_NOT_OURS ? real_cudaFreeAsync_ptsz(pointer, stream) : result;
}

INTERPOSED int cuMemFreeAsync(uint64_t pointer, void *stream)
{
	int result = rw_free(pointer, real_cuMemFree_v2);

	return result == RW_NOT_OURS ? real_cuMemFreeAsync(pointer, stream) : result;
}

INTERPOSED int cuMemFreeAsync_ptsz(uint64_t pointer, void *stream)
{
	int result = rw_free(pointer, real_cuMemFree_v2);

	return result == RW_NOT_OURS ? real_cuMemFreeAsync_ptsz(pointer, stream) : result;
}

/* The driver would give the piece. */
INTERPOSED int cuMemGetAddressRange_v2(uint64_t *base, size_t *size, uint64_t pointer)
{
	uint64_t start, asked;

	if (!rw_around(pointer, &start, &asked))
		return real_cuMemGetAddressRange_v2(base, size, pointer);
	if (base != NULL)
		*base = start;
	if (size != NULL)
		*size = asked;
	return CUDA_SUCCESS;
}

/* The real function refuses the handle. A program that tries again with new memory gets it from the driver. */
static void note_ipc(uint64_t pointer)
{
	static const char text[] =
		"rewarm: legacy CUDA IPC of device memory that rewarm serves is not possible, this process's further device "
		"memory comes from the driver; set annotation rewarm.dev/device-memory: off for this container\n";
	uint64_t start, asked;

	if (!rw_around(pointer, &start, &asked))
		return;
	if (rw_serving() && write(STDERR_FILENO, text, sizeof(text) - 1) < 0) {
		/* no stderr, nobody to tell */
	}
	rw_stop_serving();
}

INTERPOSED int cudaIpcGetMemHandle(void *handle, void *pointer)
{
	note_ipc(number(pointer));
	return real_cudaIpcGetMemHandle(handle, pointer);
}

INTERPOSED int cuIpcGetMemHandle(void *handle, uint64_t pointer)
{
	note_ipc(pointer);
	return real_cuIpcGetMemHandle(handle, pointer);
}

static int changed_peer(int owner, int device, bool access)
{
	if (owner < 0 || owner >= RW_DEVICES || device < 0 || device >= RW_DEVICES || owner == device)
		return CUDA_SUCCESS;
	if (access)
		rw_add_peer((uint32_t)owner, (uint32_t)device);
	else
		rw_remove_peer((uint32_t)owner, (uint32_t)device);
	return rw_change_peer((uint32_t)owner, (uint32_t)device, access);
}

INTERPOSED int cudaDeviceEnablePeerAccess(int peer, unsigned flags)
{
	int device, result = real_cudaDeviceEnablePeerAccess(peer, flags);

	if (result != CUDA_SUCCESS || real_cudaGetDevice(&device) != CUDA_SUCCESS)
		return result;
	return changed_peer(peer, device, true);
}

INTERPOSED int cudaDeviceDisablePeerAccess(int peer)
{
	int device, result = real_cudaDeviceDisablePeerAccess(peer);

	if (result != CUDA_SUCCESS || real_cudaGetDevice(&device) != CUDA_SUCCESS)
		return result;
	return changed_peer(peer, device, false);
}

/* Only between primary contexts: memory of others is not served. */
static int changed_context_peer(void *peer, bool access)
{
	const struct rw_driver *driver = rw_find_driver();
	void *context = NULL;
	int owner = -1, device = -1;

	if (driver == NULL || driver->cuCtxGetCurrent(&context) != CUDA_SUCCESS ||
	    driver->cuCtxGetDevice(&device) != CUDA_SUCCESS || driver->cuCtxPushCurrent_v2(peer) != CUDA_SUCCESS)
		return CUDA_SUCCESS;
	driver->cuCtxGetDevice(&owner);
	driver->cuCtxPopCurrent_v2(&peer);
	if (owner < 0 || owner >= RW_DEVICES || device < 0 || device >= RW_DEVICES ||
	    !rw_is_primary(driver, (uint32_t)owner, peer) || !rw_is_primary(driver, (uint32_t)device, context))
		return CUDA_SUCCESS;
	return changed_peer(owner, device, access);
}

INTERPOSED int cuCtxEnablePeerAccess(void *peer, unsigned flags)
{
	int result = real_cuCtxEnablePeerAccess(peer, flags);

	return result != CUDA_SUCCESS ? result : changed_context_peer(peer, true);
}

INTERPOSED int cuCtxDisablePeerAccess(void *peer)
{
	int result = real_cuCtxDisablePeerAccess(peer);

	return result != CUDA_SUCCESS ? result : changed_context_peer(peer, false);
}

INTERPOSED int cudaDeviceReset(void)
{
	int device;

	if (rw_driver() != NULL && real_cudaGetDevice(&device) == CUDA_SUCCESS && device >= 0)
		rw_free_device((uint32_t)device);
	return real_cudaDeviceReset();
}

INTERPOSED int cuDevicePrimaryCtxReset(int device)
{
	if (device >= 0)
		rw_free_device((uint32_t)device);
	return real_cuDevicePrimaryCtxReset(device);
}

INTERPOSED int cuDevicePrimaryCtxReset_v2(int device)
{
	if (device >= 0)
		rw_free_device((uint32_t)device);
	return real_cuDevicePrimaryCtxReset_v2(device);
}
