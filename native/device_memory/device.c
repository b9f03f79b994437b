#include "device.h"

static struct {
	void *primary;
	uint64_t peers;
	size_t granularity;
	bool rdma;
	bool anchored;
	bool asked; /* written last */
} devices[RW_DEVICES];

struct rw_kind rw_kind_of(uint32_t device)
{
	return (struct rw_kind){
		.type = CU_MEM_ALLOCATION_TYPE_PINNED,
		.handle_types = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
		.location = { CU_MEM_LOCATION_TYPE_DEVICE, (int)device },
		.rdma = __atomic_load_n(&devices[device].rdma, __ATOMIC_RELAXED),
	};
}

/* Several threads may find the same out at once, which does no harm. What the driver does not tell (yet) is not kept. */
size_t rw_granularity(const struct rw_driver *driver, uint32_t device)
{
	enum { RDMA, VIRTUAL, DESCRIPTORS, MODE, QUESTIONS };
	static const int attributes[QUESTIONS] = {
		CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED,
		CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
		CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
		CU_DEVICE_ATTRIBUTE_COMPUTE_MODE,
	};
	int values[QUESTIONS] = { 0 };
	size_t granularity = 0;

	if (__atomic_load_n(&devices[device].asked, __ATOMIC_ACQUIRE))
		return __atomic_load_n(&devices[device].granularity, __ATOMIC_RELAXED);
	for (size_t at = 0; at < QUESTIONS; at++)
		if (driver->cuDeviceGetAttribute(&values[at], attributes[at], (int)device) != CUDA_SUCCESS)
			return 0;
	__atomic_store_n(&devices[device].rdma, values[RDMA] != 0, __ATOMIC_RELAXED);
	struct rw_kind kind = rw_kind_of(device);
	/* With the GPU for itself alone, the program would be in the way of rewarm's own context. */
	if (values[MODE] != CU_COMPUTEMODE_EXCLUSIVE_PROCESS && values[VIRTUAL] != 0 && values[DESCRIPTORS] != 0 &&
	    driver->cuMemGetAllocationGranularity(&granularity, &kind, CU_MEM_ALLOC_GRANULARITY_MINIMUM) != CUDA_SUCCESS)
		return 0;
	__atomic_store_n(&devices[device].granularity, granularity, __ATOMIC_RELAXED);
	__atomic_store_n(&devices[device].asked, true, __ATOMIC_RELEASE);
	return granularity;
}

bool rw_is_primary(const struct rw_driver *driver, uint32_t device, const void *context)
{
	void *primary = NULL;
	unsigned flags;
	int active = 0;

	if (__atomic_load_n(&devices[device].primary, __ATOMIC_RELAXED) == context)
		return true;
	if (driver->cuDevicePrimaryCtxGetState((int)device, &flags, &active) != CUDA_SUCCESS || !active ||
	    driver->cuDevicePrimaryCtxRetain(&primary, (int)device) != CUDA_SUCCESS)
		return false;
	driver->cuDevicePrimaryCtxRelease_v2((int)device);
	if (primary == context)
		__atomic_store_n(&devices[device].primary, primary, __ATOMIC_RELAXED);
	return primary == context;
}

void rw_anchor(const struct rw_driver *driver, uint32_t device)
{
	uint64_t address;

	if (!__atomic_load_n(&devices[device].anchored, __ATOMIC_RELAXED) &&
	    !__atomic_exchange_n(&devices[device].anchored, true, __ATOMIC_RELAXED) &&
	    driver->cuMemAlloc_v2(&address, 1) != CUDA_SUCCESS)
		__atomic_store_n(&devices[device].anchored, false, __ATOMIC_RELAXED);
}

void rw_forget_device(uint32_t device)
{
	__atomic_store_n(&devices[device].anchored, false, __ATOMIC_RELAXED);
	__atomic_store_n(&devices[device].primary, NULL, __ATOMIC_RELAXED);
	__atomic_store_n(&devices[device].peers, 0, __ATOMIC_RELAXED);
	for (uint32_t owner = 0; owner < RW_DEVICES; owner++)
		rw_remove_peer(owner, device);
}

/* In one order with the table's lock: either who inserts an allocation sees the new peer, or who adds the peer sees the
 * allocation. */
void rw_add_peer(uint32_t owner, uint32_t peer)
{
	__atomic_or_fetch(&devices[owner].peers, 1ull << peer, __ATOMIC_SEQ_CST);
}

void rw_remove_peer(uint32_t owner, uint32_t peer)
{
	__atomic_and_fetch(&devices[owner].peers, ~(1ull << peer), __ATOMIC_SEQ_CST);
}

uint64_t rw_accessors(uint32_t owner)
{
	return __atomic_load_n(&devices[owner].peers, __ATOMIC_SEQ_CST) | 1ull << owner;
}

int rw_set_access(const struct rw_driver *driver, uint32_t owner, uint64_t address, uint64_t size)
{
	struct rw_access access[RW_DEVICES];
	uint64_t mask = rw_accessors(owner);
	size_t count = 0;

	for (int device = 0; device < RW_DEVICES; device++)
		if (mask >> device & 1)
			access[count++] = (struct rw_access){ { CU_MEM_LOCATION_TYPE_DEVICE, device },
							      CU_MEM_ACCESS_FLAGS_PROT_READWRITE };
	return driver->cuMemSetAccess(address, size, access, count);
}

int rw_set_peer_access(const struct rw_driver *driver, uint32_t peer, uint64_t address, uint64_t size, int flags)
{
	struct rw_access access = { { CU_MEM_LOCATION_TYPE_DEVICE, (int)peer }, flags };

	return driver->cuMemSetAccess(address, size, &access, 1);
}
