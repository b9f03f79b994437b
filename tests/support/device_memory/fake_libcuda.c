/* A libcuda.so.1 for the tests of rewarm-device-memory.so: device memory is memfds, mapped at reserved addresses as the
 * real driver maps device memory, so that its content can be read and compared. What the real one refuses it refuses,
 * where the library depends on it: unknown ranges, ranges that cover a mapping in part, an export of imported memory.
 *
 * FAKE_LIMIT: bytes of memory in all (64 GiB). FAKE_NO_VMM: no device has virtual memory management.
 * What the tests look at and change from outside: fake_count(), fake_access(), fake_set().
 */
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))

enum { OK, INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED };
enum { INVALID_DEVICE = 101, INVALID_CONTEXT = 201, PEER_ALREADY = 704, PEER_NOT = 705 };
enum { NOT_FOUND = 500, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900 };
enum { TINY = 256 }; /* these fit in what the driver has anyway: they count apart, and what is smaller again */
enum { NEWER = 99000, DEVICES = 3, GRANULE = 2 << 20, STACK = 16 };

struct memory {
	struct memory *next;
	int file, device;
	uint64_t size, handles, maps;
	bool imported, exportable;
};

struct range {
	struct range *next;
	uint64_t address, size, access;
	struct memory *memory; /* of a mapping */
	int device;	       /* of a driver's allocation */
};

struct context {
	int device, holders;
	uint64_t peers;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct range *reserved, *mapped, *allocated;
static struct memory *memories, *spare;
static struct context *primary[DEVICES];
static uint64_t used, handles, syncs, tiny, anchors;
static bool initialised;
static struct {
	int sticky, capturing, broken, fail_map, fail_access, fail_export, fail_release, slow_ms;
} state;
static __thread struct context *stack[STACK];
static __thread int top = -1, mode;

static void leave(const int *nothing)
{
	(void)nothing;
	pthread_mutex_unlock(&lock);
}

/* Where it is a part of a larger fake (fake_cuda_copies.c). */
__attribute__((weak)) void fake_enter(void);
__attribute__((weak)) int fake_uuid(uint8_t *uuid, int device);
__attribute__((weak)) void fake_finish(void *stream);
__attribute__((weak)) int fake_copy(void *stream, void *to, const void *from, size_t size);

#define LOCKED                                                   \
	if (fake_enter != NULL)                                  \
		fake_enter();                                    \
	__attribute__((cleanup(leave), unused)) const int held = 0; \
	pthread_mutex_lock(&lock)

static struct range **find(struct range **list, uint64_t address, uint64_t size)
{
	while (*list != NULL && ((*list)->address != address || (*list)->size != size))
		list = &(*list)->next;
	return list;
}

static struct range *around(struct range *list, uint64_t address)
{
	while (list != NULL && address - list->address >= list->size)
		list = list->next;
	return list;
}

static void add(struct range **list, struct range values)
{
	struct range *new = malloc(sizeof(*new));

	*new = values;
	new->next = *list;
	*list = new;
}

static void drop(struct range **at)
{
	struct range *old = *at;

	*at = old->next;
	free(old);
}

/* A handle is the address of something of the driver's, which has no check: one that is gone crashes the program, or is
 * something else by now (measured). The last that is gone is the next that is made. */
static struct memory *made(void)
{
	struct memory *new = spare != NULL ? spare : malloc(sizeof(*new));

	spare = spare != NULL ? spare->next : NULL;
	*new = (struct memory){ .next = memories };
	memories = new;
	return new;
}

static void check_handle(const struct memory *memory)
{
	struct memory *one = memories;

	while (one != NULL && one != memory)
		one = one->next;
	if (one == NULL)
		abort();
}

static void let_go(struct memory *memory)
{
	struct memory **at = &memories;

	if (memory->handles > 0 || memory->maps > 0)
		return;
	if (!memory->imported)
		used -= memory->size;
	close(memory->file);
	while (*at != memory)
		at = &(*at)->next;
	*at = memory->next;
	memory->next = spare;
	spare = memory;
}

static void *blank(uint64_t address, uint64_t size)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (address != 0 ? MAP_FIXED : 0);

	return mmap((void *)address, size, PROT_NONE, flags, -1, 0);
}

static uint64_t limit(void)
{
	const char *text = getenv("FAKE_LIMIT");

	return text == NULL ? 64ull << 30 : strtoull(text, NULL, 0);
}

static void count_memory(const struct range *range, int sign)
{
	if (range->size > TINY)
		used += (uint64_t)sign * range->size;
	else if (range->size == TINY)
		tiny += (uint64_t)sign;
	else
		anchors += (uint64_t)sign;
}

/* As measured on a real driver for a capture in the global mode: what may wait breaks it, unless the thread's own mode
 * is another. */
static bool breaks_capture(void)
{
	if (!state.capturing || mode != 0)
		return false;
	state.broken++;
	return true;
}

/* --- what the tests use --- */

enum {
	COUNT_HANDLES,
	COUNT_MAPPED,
	COUNT_RESERVED,
	COUNT_ALLOCATED,
	COUNT_SYNCS,
	COUNT_USED,
	COUNT_BROKEN,
	COUNT_TINY,
	COUNT_ANCHORS
};

API int64_t fake_count(int which)
{
	LOCKED;
	int64_t count = 0;

	switch (which) {
	case COUNT_HANDLES: return (int64_t)handles;
	case COUNT_SYNCS: return (int64_t)syncs;
	case COUNT_USED: return (int64_t)used;
	case COUNT_BROKEN: return state.broken;
	case COUNT_TINY: return (int64_t)tiny;
	case COUNT_ANCHORS: return (int64_t)anchors;
	default: break;
	}
	struct range *list = which == COUNT_MAPPED ? mapped : which == COUNT_RESERVED ? reserved : allocated;
	for (struct range *one = list; one != NULL; one = one->next)
		count += one->size > TINY;
	return count;
}

API uint64_t fake_access(uint64_t address)
{
	LOCKED;
	struct range *one = around(mapped, address);

	return one == NULL ? 0 : one->access;
}

API void fake_set(const char *what, int value)
{
	LOCKED;
	if (strcmp(what, "sticky") == 0)
		state.sticky = value;
	else if (strcmp(what, "capturing") == 0)
		state.capturing = value;
	else if (strcmp(what, "fail_map") == 0)
		state.fail_map = value;
	else if (strcmp(what, "fail_access") == 0)
		state.fail_access = value;
	else if (strcmp(what, "slow_ms") == 0)
		__atomic_store_n(&state.slow_ms, value, __ATOMIC_RELAXED);
	else if (strcmp(what, "fail_export") == 0)
		state.fail_export = value;
	else if (strcmp(what, "fail_release") == 0)
		state.fail_release = value;
	else
		abort();
}

/* --- contexts --- */

API int cuInit(unsigned flags)
{
	initialised = true;
	return flags == 0 ? OK : INVALID_VALUE;
}

API int cuCtxGetCurrent(struct context **context)
{
	*context = top < 0 ? NULL : stack[top];
	return initialised ? OK : NOT_INITIALIZED;
}

API int cuCtxSetCurrent(struct context *context)
{
	if (top < 0)
		top = 0;
	stack[top] = context;
	return OK;
}

API int cuCtxPushCurrent_v2(struct context *context)
{
	if (context == NULL || top + 1 >= STACK)
		return INVALID_CONTEXT;
	stack[++top] = context;
	return OK;
}

API int cuCtxPopCurrent_v2(struct context **context)
{
	if (top < 0)
		return INVALID_CONTEXT;
	*context = stack[top--];
	return OK;
}

API int cuCtxGetDevice(int *device)
{
	if (top < 0 || stack[top] == NULL)
		return INVALID_CONTEXT;
	*device = stack[top]->device;
	return OK;
}

API int cuCtxCreate_v2(struct context **context, unsigned flags, int device)
{
	(void)flags;
	if (device < 0 || device >= DEVICES)
		return INVALID_DEVICE;
	*context = calloc(1, sizeof(**context));
	(*context)->device = device;
	return cuCtxPushCurrent_v2(*context);
}

API int cuCtxSynchronize(void)
{
	LOCKED;
	if (top < 0 || stack[top] == NULL)
		return INVALID_CONTEXT;
	syncs++;
	if (state.capturing) {
		state.broken++;
		return CAPTURE_UNSUPPORTED;
	}
	return state.sticky;
}

API int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
	LOCKED;
	*flags = 0;
	*active = primary[device] != NULL;
	return OK;
}

API int cuDevicePrimaryCtxRetain(struct context **context, int device)
{
	LOCKED;
	if (device < 0 || device >= DEVICES)
		return INVALID_DEVICE;
	if (primary[device] == NULL) {
		primary[device] = calloc(1, sizeof(**primary));
		primary[device]->device = device;
	}
	primary[device]->holders++;
	*context = primary[device];
	return OK;
}

API int cuDevicePrimaryCtxRelease_v2(int device)
{
	LOCKED;
	if (primary[device] == NULL)
		return INVALID_CONTEXT;
	if (--primary[device]->holders == 0)
		primary[device] = NULL;
	return OK;
}

API int cuDevicePrimaryCtxReset_v2(int device)
{
	LOCKED;
	primary[device] = NULL;
	state.sticky = 0;
	for (struct range **at = &allocated; *at != NULL;)
		if ((*at)->device == device) {
			count_memory(*at, -1);
			munmap((void *)(*at)->address, (*at)->size);
			drop(at);
		} else {
			at = &(*at)->next;
		}
	return OK;
}

API int cuDeviceGetAttribute(int *value, int attribute, int device)
{
	(void)device;
	*value = attribute >= 102 && attribute <= 110 && getenv("FAKE_NO_VMM") == NULL;
	return OK;
}

API int cuDeviceGetUuid_v2(uint8_t *uuid, int device)
{
	if (fake_uuid != NULL)
		return fake_uuid(uuid, device);
	memset(uuid, 0x10 + device, 16);
	return OK;
}

API int cuDeviceGetUuid(uint8_t *uuid, int device)
{
	return cuDeviceGetUuid_v2(uuid, device);
}

API int cuThreadExchangeStreamCaptureMode(int *exchanged)
{
	int before = mode;

	mode = *exchanged;
	*exchanged = before;
	return OK;
}

static int change_peer(struct context *peer, bool on)
{
	LOCKED;
	struct context *own = top < 0 ? NULL : stack[top];

	if (own == NULL || peer == NULL || peer == own)
		return INVALID_CONTEXT;
	if (((own->peers >> peer->device & 1) != 0) == on)
		return on ? PEER_ALREADY : PEER_NOT;
	own->peers ^= 1ull << peer->device;
	return OK;
}

API int cuCtxEnablePeerAccess(struct context *peer, unsigned flags)
{
	return flags == 0 ? change_peer(peer, true) : INVALID_VALUE;
}

API int cuCtxDisablePeerAccess(struct context *peer)
{
	return change_peer(peer, false);
}

/* --- the driver's own allocations --- */

API int cuMemAlloc_v2(uint64_t *address, size_t size)
{
	LOCKED;
	if (top < 0 || stack[top] == NULL)
		return INVALID_CONTEXT;
	if (address == NULL || size == 0)
		return INVALID_VALUE;
	if (breaks_capture())
		return CAPTURE_UNSUPPORTED;
	if (size > TINY && (size > limit() || used + size > limit()))
		return OUT_OF_MEMORY;
	void *place = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (place == MAP_FAILED)
		return OUT_OF_MEMORY;
	*address = (uintptr_t)place;
	add(&allocated, (struct range){ .address = *address, .size = size, .device = stack[top]->device });
	count_memory(allocated, 1);
	return OK;
}

API int cuMemFree_v2(uint64_t address)
{
	LOCKED;
	struct range *one = around(allocated, address);

	if (one == NULL || one->address != address)
		return INVALID_VALUE;
	if (breaks_capture())
		return CAPTURE_UNSUPPORTED;
	syncs++;
	if (state.sticky != 0)
		return state.sticky;
	count_memory(one, -1);
	munmap((void *)address, one->size);
	drop(find(&allocated, one->address, one->size));
	return OK;
}

API int cuMemFreeAsync(uint64_t address, void *stream)
{
	(void)stream;
	return cuMemFree_v2(address);
}

API int cuMemGetAddressRange_v2(uint64_t *base, size_t *size, uint64_t address)
{
	LOCKED;
	struct range *one = around(allocated, address);

	if (one == NULL)
		one = around(mapped, address);
	if (one == NULL)
		return INVALID_VALUE;
	*base = one->address;
	*size = one->size;
	return OK;
}

API int cuIpcGetMemHandle(void *handle, uint64_t address)
{
	LOCKED;
	if (around(allocated, address) == NULL)
		return INVALID_VALUE;
	memset(handle, 1, 64);
	return OK;
}

/* --- virtual memory management --- */

struct kind {
	int type, handle_types, location, device;
	void *windows;
	uint8_t flags[8];
};
struct access {
	int location, device, flags;
};

API int cuMemGetAllocationGranularity(size_t *granularity, const struct kind *kind, int option)
{
	*granularity = GRANULE;
	return kind->type == 1 && option == 0 ? OK : INVALID_VALUE;
}

API int cuMemAddressReserve(uint64_t *address, size_t size, size_t alignment, uint64_t hint, uint64_t flags)
{
	LOCKED;
	if (size == 0 || size % GRANULE != 0 || alignment != 0 || hint != 0 || flags != 0)
		return INVALID_VALUE;
	if (size >> 46 != 0)
		return OUT_OF_MEMORY;
	void *wide = blank(0, size + GRANULE);
	if (wide == MAP_FAILED)
		return OUT_OF_MEMORY;
	uint64_t first = (uintptr_t)wide, start = (first + GRANULE - 1) / GRANULE * GRANULE;
	if (start > first)
		munmap(wide, start - first);
	munmap((void *)(start + size), first + GRANULE - start);
	*address = start;
	add(&reserved, (struct range){ .address = start, .size = size });
	return OK;
}

API int cuMemAddressFree(uint64_t address, size_t size)
{
	LOCKED;
	struct range **at = find(&reserved, address, size);

	if (*at == NULL)
		return INVALID_VALUE;
	for (struct range *one = mapped; one != NULL; one = one->next)
		if (one->address - address < size)
			return INVALID_VALUE;
	munmap((void *)address, size);
	drop(at);
	return OK;
}

/* So that a test can look into the middle of a call. */
static void be_slow(void)
{
	usleep((unsigned)__atomic_load_n(&state.slow_ms, __ATOMIC_RELAXED) * 1000);
}

static int new_memory(struct memory **handle, int file, uint64_t size, int device, bool exportable)
{
	if (file < 0)
		return OUT_OF_MEMORY;
	*handle = made();
	(*handle)->file = file;
	(*handle)->size = size;
	(*handle)->device = device;
	(*handle)->handles = 1;
	(*handle)->exportable = exportable;
	handles++;
	return OK;
}

API int cuMemCreate(struct memory **handle, size_t size, const struct kind *kind, uint64_t flags)
{
	be_slow();
	LOCKED;
	if (size == 0 || size % GRANULE != 0 || flags != 0)
		return INVALID_VALUE;
	if (kind->type != 1 || kind->location != 1 || (kind->handle_types & ~1) != 0)
		return INVALID_VALUE;
	if (state.fail_export && kind->handle_types != 0)
		return NOT_SUPPORTED;
	if (kind->device < 0 || kind->device >= DEVICES)
		return INVALID_DEVICE;
	if (used + size > limit())
		return OUT_OF_MEMORY;
	int file = memfd_create("device", MFD_CLOEXEC);
	if (file >= 0 && ftruncate(file, (off_t)size) != 0) {
		close(file);
		file = -1;
	}
	/* What is in new memory nobody says. */
	for (size_t at = 0; file >= 0 && getenv("FAKE_CUDA_DIRTY") != NULL && at < size; at += GRANULE)
		if (pwrite(file, "dirty", 5, (off_t)(at + GRANULE / 2)) != 5)
			return OUT_OF_MEMORY;
	int result = new_memory(handle, file, size, kind->device, kind->handle_types == 1);
	if (result == OK)
		used += size;
	return result;
}

/* Of this process's own only: what others have is theirs. */
API int cuMemGetInfo_v2(size_t *free, size_t *total)
{
	LOCKED;
	if (top < 0 || stack[top] == NULL)
		return INVALID_CONTEXT;
	*total = limit();
	*free = used < *total ? *total - used : 0;
	return OK;
}

API int cuMemRelease(struct memory *memory)
{
	be_slow();
	LOCKED;
	if (memory == NULL)
		return INVALID_VALUE;
	check_handle(memory);
	if (memory->handles == 0)
		return INVALID_VALUE;
	if (state.fail_release > 0 && --state.fail_release == 0)
		return state.sticky;
	memory->handles--;
	handles--;
	let_go(memory);
	return OK;
}

static int map(uint64_t address, size_t size, size_t offset, struct memory *memory, uint64_t flags)
{
	be_slow();
	LOCKED;
	struct range *inside = around(reserved, address);

	if (state.fail_map > 0 && --state.fail_map == 0)
		return OUT_OF_MEMORY;
	if (inside == NULL || address + size > inside->address + inside->size)
		return INVALID_VALUE;
	check_handle(memory);
	if (offset != 0 || flags != 0 || size != memory->size)
		return INVALID_VALUE;
	for (struct range *one = mapped; one != NULL; one = one->next)
		if (one->address < address + size && address < one->address + one->size)
			return INVALID_VALUE;
	if (mmap((void *)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, memory->file, 0) == MAP_FAILED)
		return OUT_OF_MEMORY;
	memory->maps++;
	add(&mapped, (struct range){ .address = address, .size = size, .memory = memory });
	return OK;
}

API int cuMemMap(uint64_t address, size_t size, size_t offset, struct memory *memory, uint64_t flags)
{
	return map(address, size, offset, memory, flags);
}

API int cuMemUnmap(uint64_t address, size_t size)
{
	be_slow();
	LOCKED;
	struct range **at = &mapped;
	uint64_t covered = 0;

	for (struct range *one = mapped; one != NULL; one = one->next)
		if (one->address - address < size && one->address + one->size <= address + size)
			covered += one->size;
	if (size == 0 || covered != size || blank(address, size) == MAP_FAILED)
		return INVALID_VALUE;
	while (*at != NULL)
		if ((*at)->address - address < size) {
			(*at)->memory->maps--;
			let_go((*at)->memory);
			drop(at);
		} else {
			at = &(*at)->next;
		}
	return OK;
}

API int cuMemSetAccess(uint64_t address, size_t size, const struct access *access, size_t count)
{
	be_slow();
	LOCKED;
	uint64_t covered = 0;

	for (struct range *one = mapped; one != NULL; one = one->next)
		if (one->address >= address && one->address + one->size <= address + size)
			covered += one->size;
	if (size == 0 || covered != size || count == 0)
		return INVALID_VALUE;
	if (state.fail_access > 0 && --state.fail_access == 0)
		return OUT_OF_MEMORY;
	for (size_t at = 0; at < count; at++) {
		if (access[at].device < 0 || access[at].device >= DEVICES || access[at].location != 1)
			return INVALID_DEVICE;
		for (struct range *one = mapped; one != NULL; one = one->next) {
			if (one->address < address || one->address + one->size > address + size)
				continue;
			one->access &= ~(1ull << access[at].device);
			one->access |= (uint64_t)(access[at].flags == 3) << access[at].device;
			bool owner = one->access >> one->memory->device & 1;
			int protection = owner ? PROT_READ | PROT_WRITE : access[at].flags == 1 ? PROT_READ : PROT_NONE;
			mprotect((void *)one->address, one->size, protection);
		}
	}
	return OK;
}

API int cuMemRetainAllocationHandle(struct memory **handle, uint64_t address)
{
	be_slow();
	LOCKED;
	struct range *one = around(mapped, address);

	if (one == NULL)
		return INVALID_VALUE;
	*handle = one->memory;
	one->memory->handles++;
	handles++;
	return OK;
}

API int cuMemExportToShareableHandle(int *shared, struct memory *memory, int type, uint64_t flags)
{
	be_slow();
	LOCKED;
	check_handle(memory);
	if (!memory->exportable || type != 1 || flags != 0) /* nor what is imported, as measured on a real driver */
		return INVALID_VALUE;
	*shared = dup(memory->file);
	return *shared < 0 ? OUT_OF_MEMORY : OK;
}

API int cuMemImportFromShareableHandle(struct memory **handle, void *shared, int type)
{
	be_slow();
	LOCKED;
	int number = (int)(uintptr_t)shared;
	off_t size = lseek(number, 0, SEEK_END);

	if (type != 1 || size <= 0 || size % GRANULE != 0)
		return INVALID_VALUE;
	int result = new_memory(handle, dup(number), (uint64_t)size, 0, false);
	if (result == OK)
		(*handle)->imported = true;
	return result;
}

/* As measured: what is imported, or not made for it, has no handle types. */
API int cuMemGetAllocationPropertiesFromHandle(struct kind *kind, struct memory *memory)
{
	be_slow();
	LOCKED;
	check_handle(memory);
	*kind = (struct kind){ .type = 1, .handle_types = memory->exportable, .location = 1, .device = memory->device };
	return OK;
}

API int cuMulticastCreate(struct memory **handle, const void *kind)
{
	be_slow();
	LOCKED;
	(void)kind;
	return new_memory(handle, memfd_create("multicast", MFD_CLOEXEC), 0, 0, false);
}

API int cuMulticastBindMem(struct memory *group, size_t offset, struct memory *memory, size_t from, size_t size,
			   uint64_t flags)
{
	be_slow();
	LOCKED;
	check_handle(group);
	check_handle(memory);
	return offset == 0 && from == 0 && size == memory->size && flags == 0 ? OK : INVALID_VALUE;
}

API int cuMulticastBindAddr(struct memory *group, size_t offset, uint64_t address, size_t size, uint64_t flags)
{
	be_slow();
	LOCKED;
	struct range **one = find(&mapped, address, size);

	check_handle(group);
	return *one != NULL && offset == 0 && flags == 0 ? OK : INVALID_VALUE;
}

API int cuStreamCreate(void **stream, unsigned flags)
{
	*stream = malloc(1);
	return flags == 1 && *stream != NULL ? OK : INVALID_VALUE;
}

API int cuStreamSynchronize(void *stream)
{
	if (stream != NULL && fake_finish != NULL)
		fake_finish(stream);
	return stream != NULL ? OK : INVALID_VALUE;
}

API int cuStreamDestroy_v2(void *stream)
{
	free(stream);
	return OK;
}

API int cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t size, void *stream)
{
	if (top < 0 || stack[top] == NULL || stream == NULL || breaks_capture())
		return INVALID_CONTEXT;
	if (fake_copy != NULL)
		return fake_copy(stream, (void *)target, (const void *)source, size);
	memcpy((void *)target, (const void *)source, size);
	return OK;
}

API int cuMulticastBindMem_v2(struct memory *group, int device, size_t offset, struct memory *memory, size_t from,
			      size_t size, uint64_t flags)
{
	return device != 0 ? INVALID_DEVICE : cuMulticastBindMem(group, offset, memory, from, size, flags);
}

API int cuMulticastBindAddr_v2(struct memory *group, int device, size_t offset, uint64_t address, size_t size,
			       uint64_t flags)
{
	return device != 0 ? INVALID_DEVICE : cuMulticastBindAddr(group, offset, address, size, flags);
}

/* --- by name --- */

/* Other code, that it be at another address. */
static int newer_map(uint64_t address, size_t size, size_t offset, struct memory *memory, uint64_t flags)
{
	return size == 0 ? INVALID_VALUE : map(address, size, offset, memory, flags);
}

API int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status)
{
	static const struct {
		const char *name;
		void *function;
	} functions[] = {
#define FUNCTION(name) { #name, (void *)name }
		FUNCTION(cuMemAddressReserve), FUNCTION(cuMemAddressFree), FUNCTION(cuMemCreate), FUNCTION(cuMemRelease),
		FUNCTION(cuMemMap), FUNCTION(cuMemUnmap), FUNCTION(cuMemSetAccess), FUNCTION(cuMemRetainAllocationHandle),
		FUNCTION(cuMemExportToShareableHandle), FUNCTION(cuMemImportFromShareableHandle),
		FUNCTION(cuMemGetAllocationPropertiesFromHandle), FUNCTION(cuMulticastCreate), FUNCTION(cuMulticastBindMem),
		FUNCTION(cuMulticastBindAddr),
	};

	*found = NULL;
	for (size_t at = 0; at < sizeof(functions) / sizeof(functions[0]); at++)
		if (strcmp(name, functions[at].name) == 0)
			*found = functions[at].function;
	if (version >= 13010 && *found == (void *)cuMulticastBindMem)
		*found = (void *)cuMulticastBindMem_v2;
	/* As if it had got other parameters. */
	if (version >= NEWER && *found == (void *)cuMemMap)
		*found = (void *)newer_map;
	if (status != NULL)
		*status = *found == NULL;
	return flags != 0 ? INVALID_VALUE : *found == NULL ? NOT_FOUND : OK;
}

API int cuGetProcAddress(const char *name, void **found, int version, uint64_t flags)
{
	return cuGetProcAddress_v2(name, found, version, flags, NULL);
}
