/* The functions of CUDA's virtual memory API that this library stands in front of. A program has to have all of them that
 * it uses, or none: each knows what the others have done. */
#ifndef REWARM_DEVICE_MEMORY_VIRTUAL_H
#define REWARM_DEVICE_MEMORY_VIRTUAL_H

#include "driver.h"

#define RW_VIRTUAL(FUNCTION) \
	FUNCTION(cuMemCreate, (uint64_t *handle, size_t size, const struct rw_kind *kind, uint64_t flags), \
		 (handle, size, kind, flags)) \
	FUNCTION(cuMemRelease, (uint64_t handle), (handle)) \
	FUNCTION(cuMemMap, (uint64_t address, size_t size, size_t offset, uint64_t handle, uint64_t flags), \
		 (address, size, offset, handle, flags)) \
	FUNCTION(cuMemUnmap, (uint64_t address, size_t size), (address, size)) \
	FUNCTION(cuMemSetAccess, (uint64_t address, size_t size, const struct rw_access *access, size_t count), \
		 (address, size, access, count)) \
	FUNCTION(cuMemRetainAllocationHandle, (uint64_t *handle, void *address), (handle, address)) \
	FUNCTION(cuMemExportToShareableHandle, (void *shared, uint64_t handle, int type, uint64_t flags), \
		 (shared, handle, type, flags)) \
	FUNCTION(cuMemImportFromShareableHandle, (uint64_t *handle, void *shared, int type), (handle, shared, type)) \
	FUNCTION(cuMemGetAllocationPropertiesFromHandle, (struct rw_kind *kind, uint64_t handle), (kind, handle)) \
	FUNCTION(cuMulticastCreate, (uint64_t *handle, const void *kind), (handle, kind)) \
	FUNCTION(cuMulticastBindMem, \
		 (uint64_t multicast, size_t offset, uint64_t handle, size_t from, size_t size, uint64_t flags), \
		 (multicast, offset, handle, from, size, flags)) \
	FUNCTION(cuMulticastBindAddr, (uint64_t multicast, size_t offset, uint64_t address, size_t size, uint64_t flags), \
		 (multicast, offset, address, size, flags)) \
	FUNCTION(cuMulticastBindMem_v2, \
		 (uint64_t multicast, int device, size_t offset, uint64_t handle, size_t from, size_t size, uint64_t flags), \
		 (multicast, device, offset, handle, from, size, flags)) \
	FUNCTION(cuMulticastBindAddr_v2, \
		 (uint64_t multicast, int device, size_t offset, uint64_t address, size_t size, uint64_t flags), \
		 (multicast, device, offset, address, size, flags))

#endif
