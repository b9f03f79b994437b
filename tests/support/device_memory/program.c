/* A program with CUDA that does what it is told: a line of words on stdin, a line of numbers on stdout. Addresses and
 * sizes are numbers as strtoull(3) reads them. It knows nothing of rewarm. */
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

extern int cudaMalloc(void **, size_t), cudaFree(void *);
extern int cudaFreeAsync(void *, void *);
extern int cudaSetDevice(int), cudaDeviceReset(void), cudaGetLastError(void), cudaIpcGetMemHandle(void *, void *);
extern int cudaDeviceEnablePeerAccess(int, unsigned), cudaDeviceDisablePeerAccess(int);
#ifdef WITH_DRIVER
extern int cuMemAlloc_v2(uint64_t *, size_t), cuMemFree_v2(uint64_t);
extern int cuMemGetAddressRange_v2(uint64_t *, size_t *, uint64_t);
extern int cuCtxCreate_v2(void **, unsigned, int), cuCtxPopCurrent_v2(void **), cuIpcGetMemHandle(void *, uint64_t);
struct kind {
	int type, handle_types, location, device;
	void *windows;
	uint8_t compression, rdma, usage[2], reserved[4];
};
struct access {
	int location, device, flags;
};
#define VIRTUAL(FUNCTION) \
	FUNCTION(cuMemAddressReserve, (uint64_t *, size_t, size_t, uint64_t, uint64_t)) \
	FUNCTION(cuMemAddressFree, (uint64_t, size_t)) \
	FUNCTION(cuMemCreate, (uint64_t *, size_t, const struct kind *, uint64_t)) \
	FUNCTION(cuMemRelease, (uint64_t)) \
	FUNCTION(cuMemMap, (uint64_t, size_t, size_t, uint64_t, uint64_t)) \
	FUNCTION(cuMemUnmap, (uint64_t, size_t)) \
	FUNCTION(cuMemSetAccess, (uint64_t, size_t, const struct access *, size_t)) \
	FUNCTION(cuMemRetainAllocationHandle, (uint64_t *, void *)) \
	FUNCTION(cuMemExportToShareableHandle, (void *, uint64_t, int, uint64_t)) \
	FUNCTION(cuMemImportFromShareableHandle, (uint64_t *, void *, int)) \
	FUNCTION(cuMemGetAllocationPropertiesFromHandle, (struct kind *, uint64_t)) \
	FUNCTION(cuMulticastCreate, (uint64_t *, const void *)) \
	FUNCTION(cuMulticastBindMem, (uint64_t, size_t, uint64_t, size_t, size_t, uint64_t)) \
	FUNCTION(cuMulticastBindAddr, (uint64_t, size_t, uint64_t, size_t, uint64_t))
extern int cuMulticastBindMem_v2(uint64_t, int, size_t, uint64_t, size_t, size_t, uint64_t);
extern int cuMulticastBindAddr_v2(uint64_t, int, size_t, uint64_t, size_t, uint64_t);
#define DECLARE(name, parameters) extern int name parameters;
#define MEMBER(name, parameters) int(*name) parameters;
#define LINKED(name, parameters) name,
VIRTUAL(DECLARE)
static struct {
	VIRTUAL(MEMBER)
} use = { VIRTUAL(LINKED) };
extern int cudaGetDriverEntryPoint(const char *, void **, unsigned long long, int *);
extern int cudaGetDriverEntryPointByVersion(const char *, void **, unsigned, unsigned long long, int *);
extern int cuGetProcAddress(const char *, void **, int, uint64_t);
extern int cuGetProcAddress_v2(const char *, void **, int, uint64_t, int *);
#endif

enum { THREADS = 4, ROUNDS = 1500, KEPT = 64, MIB = 1 << 20 };

static void *driver(const char *name)
{
	void *library = dlopen("libcuda.so.1", RTLD_NOW);
	void *found = library == NULL ? NULL : dlsym(library, name);

	if (found == NULL) {
		fprintf(stderr, "no %s: %s\n", name, dlerror());
		exit(1);
	}
	return found;
}

static int64_t count(int which)
{
	int64_t (*ask)(int) = driver("fake_count");

	return ask(which);
}

/* Allocates and frees in an order of its own, and looks whether what it wrote is there. */
static void *stir(void *seed)
{
	unsigned random = (unsigned)(uintptr_t)seed;
	uint64_t *kept[KEPT] = { NULL };
	uintptr_t wrong = 0;

	for (int round = 0; round < ROUNDS; round++) {
		int at = rand_r(&random) % KEPT;
		if (kept[at] != NULL) {
			wrong += *kept[at] != (uintptr_t)kept[at] + (uintptr_t)seed;
			wrong += cudaFree(kept[at]) != 0;
			kept[at] = NULL;
		} else {
			size_t size = rand_r(&random) % 4 == 0 ? 1000 : (size_t)(2 + rand_r(&random) % 9) * MIB;
			wrong += cudaMalloc((void **)&kept[at], size) != 0;
			*kept[at] = (uintptr_t)kept[at] + (uintptr_t)seed;
		}
	}
	for (int at = 0; at < KEPT; at++)
		wrong += kept[at] != NULL && cudaFree(kept[at]) != 0;
	return (void *)wrong;
}

#ifdef WITH_DRIVER
struct own {
	uint64_t address, handle, second;
};

static uintptr_t make_own(struct own *own, unsigned random)
{
	struct kind kind = { .type = 1, .location = 1 };
	struct access access = { 1, 0, 3 };
	uintptr_t wrong = 0;

	wrong += use.cuMemCreate(&own->handle, 2 * MIB, &kind, 0) != 0;
	wrong += use.cuMemMap(own->address, 2 * MIB, 0, own->handle, 0) != 0;
	wrong += use.cuMemSetAccess(own->address, 2 * MIB, &access, 1) != 0;
	*(uint64_t *)own->address = own->address;
	if (random % 4 == 0) {
		wrong += use.cuMemRelease(own->handle) != 0;
		own->handle = 0;
	} else if (random % 4 == 1) {
		wrong += use.cuMemMap(own->second, 2 * MIB, 0, own->handle, 0) != 0;
		wrong += use.cuMemUnmap(own->second, 2 * MIB) != 0;
	}
	return wrong;
}

static uintptr_t drop_own(struct own *own, unsigned random)
{
	uintptr_t wrong = *(uint64_t *)own->address != own->address;

	if (own->handle != 0 && random % 2 == 0) {
		wrong += use.cuMemRelease(own->handle) != 0;
		own->handle = 0;
	}
	wrong += use.cuMemUnmap(own->address, 2 * MIB) != 0;
	wrong += own->handle != 0 && use.cuMemRelease(own->handle) != 0;
	own->handle = 0;
	return wrong;
}

static void *stir_created(void *seed)
{
	unsigned random = (unsigned)(uintptr_t)seed;
	struct own all[KEPT];
	bool made[KEPT] = { false };
	uintptr_t wrong = 0;

	for (int at = 0; at < KEPT; at++) {
		wrong += use.cuMemAddressReserve(&all[at].address, 2 * MIB, 0, 0, 0) != 0;
		wrong += use.cuMemAddressReserve(&all[at].second, 2 * MIB, 0, 0, 0) != 0;
	}
	for (int round = 0; round < ROUNDS; round++) {
		int at = rand_r(&random) % KEPT;
		wrong += made[at] ? drop_own(&all[at], rand_r(&random)) : make_own(&all[at], rand_r(&random));
		made[at] = !made[at];
	}
	for (int at = 0; at < KEPT; at++)
		wrong += made[at] ? drop_own(&all[at], rand_r(&random)) : 0;
	return (void *)wrong;
}

/* What the kernel lets this process do there: a CUmemAccess_flags, as the fake has it. */
static int protection(uint64_t address)
{
	char line[512], mode[8];
	uint64_t start, end;
	int found = -1;
	FILE *maps = fopen("/proc/self/maps", "re");

	while (maps != NULL && fgets(line, sizeof(line), maps) != NULL)
		if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %7s", &start, &end, mode) == 3 && start <= address && address < end)
			found = mode[1] == 'w' ? 3 : mode[0] == 'r';
	if (maps != NULL)
		fclose(maps);
	return found;
}
#endif

static uint64_t stir_all(void *(*stir_one)(void *))
{
	pthread_t threads[THREADS];
	uint64_t wrong = 0;

	for (uintptr_t at = 0; at < THREADS; at++)
		pthread_create(&threads[at], NULL, stir_one, (void *)(at + 1));
	for (int at = 0; at < THREADS; at++) {
		void *result;
		pthread_join(threads[at], &result);
		wrong += (uintptr_t)result;
	}
	return wrong;
}

static void fill(uint64_t address, uint64_t size, uint64_t seed)
{
	for (uint64_t at = 0; at < size / 8; at++)
		((volatile uint64_t *)address)[at] = (at + 1) * (seed | 1);
}

static bool check(uint64_t address, uint64_t size, uint64_t seed)
{
	for (uint64_t at = 0; at < size / 8; at++)
		if (((volatile uint64_t *)address)[at] != (at + 1) * (seed | 1))
			return false;
	return true;
}

static int open_descriptors(void)
{
	int found = 0;

	for (int number = 3; number < 4096; number++)
		found += fcntl(number, F_GETFD) >= 0;
	return found;
}

/* In a child of fork(2), which must be without effect on the parent: how many descriptors it has, what a free of the
 * parent's memory says there, and whether new memory there is the driver's. */
static void in_child(uint64_t address)
{
	int64_t before = count(1);
	fflush(stdout);
	pid_t child = fork();

	if (child == 0) {
		int descriptors = open_descriptors(), freed = cudaFree((void *)address);
		uint64_t new = 0;
		int got = cudaMalloc((void **)&new, 4 * MIB);
		printf("%d %d %d %d %d\n", descriptors, freed, got, count(1) == before, count(3) > 0);
		fflush(stdout);
		_exit(0);
	}
	waitpid(child, NULL, 0);
}

static int set(const char *what, uint64_t value)
{
	void (*change)(const char *, int) = driver("fake_set");

	change(what, (int)value);
	return 0;
}

static int set_mode(int mode)
{
	int (*exchange)(int *) = driver("cuThreadExchangeStreamCaptureMode");

	return exchange(&mode);
}

#ifdef WITH_DRIVER
/* A call in a thread of its own. */
static struct {
	pthread_t thread;
	int (*release)(uint64_t);
	uint64_t a, b;
} beside;

static void *run_beside(void *nothing)
{
	(void)nothing;
	return (void *)(intptr_t)(beside.release != NULL ? beside.release(beside.a) : use.cuMemUnmap(beside.a, beside.b));
}

static int begin_beside(const char *word, uint64_t a, uint64_t b)
{
	beside.release = strcmp(word, "release") == 0 ? use.cuMemRelease : NULL;
	beside.a = a;
	beside.b = b;
	return pthread_create(&beside.thread, NULL, run_beside, NULL);
}

static int end_beside(void)
{
	void *result;

	pthread_join(beside.thread, &result);
	return (int)(intptr_t)result;
}

/* Has the functions by asking for them, in one of four ways. */
static int by_name(uint64_t way, int version)
{
	int result = 0, status = -1;

#define ASK(name, parameters)                                                                           \
	result |= way == 0 ? cudaGetDriverEntryPoint(#name, (void **)&use.name, 0, &status)             \
		: way == 1 ? cudaGetDriverEntryPointByVersion(#name, (void **)&use.name, (unsigned)version, 0, &status) \
		: way == 2 ? cuGetProcAddress(#name, (void **)&use.name, version, 0)                    \
			   : cuGetProcAddress_v2(#name, (void **)&use.name, version, 0, &status);
	VIRTUAL(ASK)
	return result;
}

static bool answer_virtual(const char *word, uint64_t a, uint64_t b, uint64_t c)
{
	struct kind kind = { .type = 1, .handle_types = (int)b, .location = 1, .device = (int)c };
	struct access access[] = { { 1, 0, (int)c }, { 1, 1, (int)c } };
	uint64_t found = 0;
	int result, shared = -1;

	if (strcmp(word, "reserve") == 0) {
		result = use.cuMemAddressReserve(&found, a, 0, 0, 0);
		printf("%d %" PRIu64 "\n", result, found);
	} else if (strcmp(word, "unreserve") == 0)
		printf("%d\n", use.cuMemAddressFree(a, b));
	else if (strcmp(word, "create") == 0) {
		result = use.cuMemCreate(&found, a, &kind, 0);
		printf("%d %" PRIu64 "\n", result, found);
	} else if (strcmp(word, "release") == 0)
		printf("%d\n", use.cuMemRelease(a));
	else if (strcmp(word, "map") == 0)
		printf("%d\n", use.cuMemMap(a, b, 0, c, 0));
	else if (strcmp(word, "unmap") == 0)
		printf("%d\n", use.cuMemUnmap(a, b));
	else if (strcmp(word, "set_access") == 0)
		printf("%d\n", use.cuMemSetAccess(a, b, access, 1));
	else if (strcmp(word, "set_access_of_two") == 0)
		printf("%d\n", use.cuMemSetAccess(a, b, access, 2));
	else if (strcmp(word, "set_access_of_another") == 0)
		printf("%d\n", use.cuMemSetAccess(a, b, &access[1], 1));
	else if (strcmp(word, "by_name") == 0)
		printf("%d\n", by_name(a, (int)b));
	else if (strcmp(word, "unseen_release") == 0)
		printf("%d\n", ((int (*)(uint64_t))driver("cuMemRelease"))(a));
	else if (strcmp(word, "unseen_unmap") == 0)
		printf("%d\n", ((int (*)(uint64_t, size_t))driver("cuMemUnmap"))(a, b));
	else if (strcmp(word, "unseen_map") == 0)
		printf("%d\n", ((int (*)(uint64_t, size_t, size_t, uint64_t, uint64_t))driver("cuMemMap"))(a, b, 0, c, 0));
	else if (strcmp(word, "protection") == 0)
		printf("%d\n", protection(a));
	else if (strcmp(word, "stir_created") == 0)
		printf("%" PRIu64 "\n", stir_all(stir_created));
	else if (strcmp(word, "retain") == 0) {
		result = use.cuMemRetainAllocationHandle(&found, (void *)a);
		printf("%d %" PRIu64 "\n", result, found);
	} else if (strcmp(word, "export") == 0) {
		result = use.cuMemExportToShareableHandle(&shared, a, 1, 0);
		printf("%d %d\n", result, shared);
	} else if (strcmp(word, "import") == 0) {
		result = use.cuMemImportFromShareableHandle(&found, (void *)a, 1);
		printf("%d %" PRIu64 "\n", result, found);
	} else if (strcmp(word, "properties") == 0) {
		result = use.cuMemGetAllocationPropertiesFromHandle(&kind, a);
		printf("%d %d %d %d\n", result, kind.type, kind.handle_types, kind.device);
	} else if (strcmp(word, "group") == 0) {
		result = use.cuMulticastCreate(&found, &kind);
		printf("%d %" PRIu64 "\n", result, found);
	} else if (strcmp(word, "bind") == 0)
		printf("%d\n", use.cuMulticastBindMem(a, 0, b, 0, c, 0));
	else if (strcmp(word, "bind_v2") == 0)
		printf("%d\n", cuMulticastBindMem_v2(a, 0, 0, b, 0, c, 0));
	else if (strcmp(word, "bind_address_v2") == 0)
		printf("%d\n", cuMulticastBindAddr_v2(a, 0, 0, b, c, 0));
	else if (strncmp(word, "beside_", 7) == 0)
		printf("%d\n", begin_beside(word + 7, a, b));
	else if (strcmp(word, "join") == 0)
		printf("%d\n", end_beside());
	else if (strcmp(word, "bind_address") == 0)
		printf("%d\n", use.cuMulticastBindAddr(a, 0, b, c, 0));
	else
		return false;
	return true;
}
#endif

static void answer(const char *word, uint64_t a, uint64_t b, uint64_t c)
{
	uint64_t found = 0;
	uint8_t handle[64];
	char line[256] = "";
	int result;

	if (strcmp(word, "malloc") == 0) {
		result = cudaMalloc((void **)&found, a);
		printf("%d %" PRIu64 "\n", result, found);
	} else if (strcmp(word, "free") == 0)
		printf("%d\n", cudaFree((void *)a));
	else if (strcmp(word, "free_async") == 0)
		printf("%d\n", cudaFreeAsync((void *)a, NULL));
	else if (strcmp(word, "malloc_null") == 0)
		printf("%d\n", cudaMalloc(NULL, a));
	else if (strcmp(word, "last_error") == 0)
		printf("%d\n", cudaGetLastError());
	else if (strcmp(word, "device") == 0)
		printf("%d\n", cudaSetDevice((int)a));
	else if (strcmp(word, "ipc") == 0)
		printf("%d\n", cudaIpcGetMemHandle(handle, (void *)a));
	else if (strcmp(word, "enable") == 0)
		printf("%d\n", cudaDeviceEnablePeerAccess((int)a, 0));
	else if (strcmp(word, "disable") == 0)
		printf("%d\n", cudaDeviceDisablePeerAccess((int)a));
	else if (strcmp(word, "reset") == 0)
		printf("%d\n", cudaDeviceReset());
	else if (strcmp(word, "access") == 0)
		printf("%" PRIu64 "\n", ((uint64_t(*)(uint64_t))driver("fake_access"))(a));
	else if (strcmp(word, "count") == 0)
		printf("%" PRId64 "\n", count((int)a));
	else if (strncmp(word, "set_", 4) == 0 && strncmp(word, "set_access", 10) != 0)
		printf("%d\n", set(word + 4, a));
	else if (strcmp(word, "mode") == 0)
		printf("%d\n", set_mode((int)a));
	else if (strcmp(word, "fill") == 0) {
		fill(a, b, c);
		printf("0\n");
	} else if (strcmp(word, "check") == 0)
		printf("%d\n", check(a, b, c));
	else if (strcmp(word, "stir") == 0)
		printf("%" PRIu64 "\n", stir_all(stir));
	else if (strcmp(word, "fork") == 0)
		in_child(a);
	else if (strcmp(word, "close") == 0)
		printf("%d\n", close((int)a));
	else if (strcmp(word, "replace") == 0)
		printf("%d\n", dup2((int)a, (int)b));
	else if (strcmp(word, "pair") == 0) {
		int pair[2];
		result = socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair);
		printf("%d %d %d\n", result, pair[0], pair[1]);
	} else if (strcmp(word, "send") == 0)
		printf("%zd\n", send((int)a, line, b, 0));
	else if (strcmp(word, "receive") == 0)
		printf("%zd\n", recv((int)a, line, sizeof(line), MSG_DONTWAIT));
	else if (strcmp(word, "descriptors") == 0)
		printf("%d\n", open_descriptors());
#ifdef WITH_DRIVER
	else if (strcmp(word, "cu_alloc") == 0) {
		result = cuMemAlloc_v2(&found, a);
		printf("%d %" PRIu64 "\n", result, found);
	} else if (strcmp(word, "cu_free") == 0)
		printf("%d\n", cuMemFree_v2(a));
	else if (strcmp(word, "cu_ipc") == 0)
		printf("%d\n", cuIpcGetMemHandle(handle, a));
	else if (strcmp(word, "cu_range") == 0) {
		size_t size = 0;
		result = cuMemGetAddressRange_v2(&found, &size, a);
		printf("%d %" PRIu64 " %zu\n", result, found, size);
	} else if (strcmp(word, "cu_context") == 0) {
		void *context;
		printf("%d\n", a == 0 ? cuCtxPopCurrent_v2(&context) : cuCtxCreate_v2(&context, 0, (int)b));
	} else if (answer_virtual(word, a, b, c))
		return;
#endif
	else
		printf("what is %s?\n", word);
}

int main(void)
{
	char line[256];

	while (fgets(line, sizeof(line), stdin) != NULL) {
		char *words[4] = { "", "0", "0", "0" }, *rest = line;
		for (int at = 0; at < 4 && (rest = strtok(at == 0 ? line : NULL, " \n")) != NULL; at++)
			words[at] = rest;
		answer(words[0], strtoull(words[1], NULL, 0), strtoull(words[2], NULL, 0), strtoull(words[3], NULL, 0));
		fflush(stdout);
	}
	return 0;
}
