/* The part of CUDA's driver API that the library calls: names and numbers of cuda.h (CUDA 11.3 to 13), which need not
 * be there to build it. */
#ifndef REWARM_DEVICE_MEMORY_DRIVER_H
#define REWARM_DEVICE_MEMORY_DRIVER_H

#include <stddef.h>
#include <stdint.h>

/* CUresult; cudaError_t has the same numbers for these. */
enum {
	CUDA_SUCCESS = 0,
	CUDA_ERROR_INVALID_VALUE = 1,
	CUDA_ERROR_OUT_OF_MEMORY = 2,
	CUDA_ERROR_NOT_INITIALIZED = 3,
};

enum {
	CU_MEM_ALLOCATION_TYPE_PINNED = 1,
	CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1,
	CU_MEM_LOCATION_TYPE_DEVICE = 1,
	CU_MEM_ACCESS_FLAGS_PROT_NONE = 0,
	CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3,
	CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0,
	CU_DEVICE_ATTRIBUTE_COMPUTE_MODE = 20,
	CU_COMPUTEMODE_EXCLUSIVE_PROCESS = 3,
	CU_STREAM_NON_BLOCKING = 1,
	CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102,
	CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103,
	CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED = 110,
	CU_STREAM_CAPTURE_MODE_RELAXED = 2,
};

struct rw_location {
	int type, id;
};

/* CUmemAllocationProp */
struct rw_kind {
	int type, handle_types;
	struct rw_location location;
	void *windows;
	unsigned char compression, rdma;
	unsigned short usage;
	unsigned char reserved[4];
};

/* CUmemAccessDesc */
struct rw_access {
	struct rw_location location;
	int flags;
};

_Static_assert(sizeof(struct rw_kind) == 32 && sizeof(struct rw_access) == 12, "cuda.h");

#define RW_DRIVER(REQUIRED, OPTIONAL) \
	REQUIRED(cuCtxGetCurrent, (void **context)) \
	REQUIRED(cuCtxSetCurrent, (void *context)) \
	REQUIRED(cuCtxPushCurrent_v2, (void *context)) \
	REQUIRED(cuCtxPopCurrent_v2, (void **context)) \
	REQUIRED(cuCtxGetDevice, (int *device)) \
	REQUIRED(cuCtxSynchronize, (void)) \
	REQUIRED(cuDevicePrimaryCtxGetState, (int device, unsigned *flags, int *active)) \
	REQUIRED(cuDevicePrimaryCtxRetain, (void **context, int device)) \
	REQUIRED(cuDevicePrimaryCtxRelease_v2, (int device)) \
	REQUIRED(cuDeviceGetAttribute, (int *value, int attribute, int device)) \
	REQUIRED(cuDeviceGetUuid, (uint8_t *uuid, int device)) \
	REQUIRED(cuMemGetAllocationGranularity, (size_t *granularity, const struct rw_kind *kind, int option)) \
	REQUIRED(cuMemAddressReserve, (uint64_t *address, size_t size, size_t alignment, uint64_t hint, uint64_t flags)) \
	REQUIRED(cuMemAddressFree, (uint64_t address, size_t size)) \
	REQUIRED(cuMemCreate, (uint64_t *handle, size_t size, const struct rw_kind *kind, uint64_t flags)) \
	REQUIRED(cuMemRelease, (uint64_t handle)) \
	REQUIRED(cuMemMap, (uint64_t address, size_t size, size_t offset, uint64_t handle, uint64_t flags)) \
	REQUIRED(cuMemUnmap, (uint64_t address, size_t size)) \
	REQUIRED(cuMemSetAccess, (uint64_t address, size_t size, const struct rw_access *access, size_t count)) \
	REQUIRED(cuMemRetainAllocationHandle, (uint64_t *handle, void *address)) \
	REQUIRED(cuMemExportToShareableHandle, (void *shared, uint64_t handle, int type, uint64_t flags)) \
	REQUIRED(cuMemImportFromShareableHandle, (uint64_t *handle, void *shared, int type)) \
	REQUIRED(cuMemAlloc_v2, (uint64_t *address, size_t size)) \
	REQUIRED(cuMemFree_v2, (uint64_t address)) \
	REQUIRED(cuStreamCreate, (void **stream, unsigned flags)) \
	REQUIRED(cuStreamSynchronize, (void *stream)) \
	REQUIRED(cuStreamDestroy_v2, (void *stream)) \
	REQUIRED(cuMemcpyDtoDAsync_v2, (uint64_t target, uint64_t source, size_t size, void *stream)) \
	REQUIRED(cuThreadExchangeStreamCaptureMode, (int *mode)) \
	OPTIONAL(cuDeviceGetUuid_v2, (uint8_t *uuid, int device))

#define RW_MEMBER(name, parameters) int(*name) parameters;
struct rw_driver {
	RW_DRIVER(RW_MEMBER, RW_MEMBER)
};
#undef RW_MEMBER

/* NULL while no libcuda is loaded, or if it lacks one of the required functions. It looks things up with the loader's
 * lock, which a stopped thread may hold: the control thread has no call of it. */
const struct rw_driver *rw_find_driver(void);

/* The same without looking: NULL before rw_find_driver() has found it. */
const struct rw_driver *rw_driver(void);

#endif
