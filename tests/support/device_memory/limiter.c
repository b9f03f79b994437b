/* Another library that is preloaded and stands in front of the driver, as limiters of device memory do: also for who asks
 * dlsym(3), which is its own. With CREATE it knows the virtual memory API as well, with HIDDEN it shows its dlsym only,
 * with DIRECT it has none. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#ifdef HIDDEN
#define SHOWN __attribute__((visibility("hidden")))
#else
#define SHOWN
#endif

typedef void *look_up(void *handle, const char *name);
typedef int alloc_call(uint64_t *address, size_t size);
typedef int create_call(void *handle, size_t size, const void *kind, uint64_t flags);

static look_up *next_dlsym(void)
{
	static look_up *found;
	static const char *const versions[] = { "GLIBC_2.34", "GLIBC_2.17", "GLIBC_2.2.5" };

	for (int at = 0; found == NULL && at < 3; at++)
		found = (look_up *)dlvsym(RTLD_NEXT, "dlsym", versions[at]);
	return found;
}

static void *of_driver(const char *name)
{
	return next_dlsym()(dlopen("libcuda.so.1", RTLD_NOW), name);
}

static void say(const char *what, size_t size)
{
	fprintf(stderr, "limiter: %s %zu\n", what, size);
}

SHOWN int cuMemAlloc_v2(uint64_t *address, size_t size)
{
	say("alloc", size);
	return ((alloc_call *)of_driver("cuMemAlloc_v2"))(address, size);
}

#ifdef CREATE
SHOWN int cuMemCreate(void *handle, size_t size, const void *kind, uint64_t flags)
{
	say("create", size);
	return ((create_call *)of_driver("cuMemCreate"))(handle, size, kind, flags);
}
#endif

#ifndef DIRECT
void *dlsym(void *handle, const char *name)
{
	if (handle != RTLD_NEXT && strcmp(name, "cuMemAlloc_v2") == 0)
		return (void *)cuMemAlloc_v2;
#ifdef CREATE
	if (handle != RTLD_NEXT && strcmp(name, "cuMemCreate") == 0)
		return (void *)cuMemCreate;
#endif
	return next_dlsym()(handle, name);
}
#endif
