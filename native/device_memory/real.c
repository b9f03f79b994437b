#include "real.h"
#include "find.h"

#include <stddef.h>

/* Those of this library. */
INTERPOSED extern int cudaMalloc(void **pointer, size_t size);
INTERPOSED extern int cuMemAlloc_v2(uint64_t *pointer, size_t size);
INTERPOSED extern int cuMemCreate(uint64_t *handle, size_t size, const struct rw_kind *kind, uint64_t flags);

/* How its file name begins: wheels give the runtime one with a hash in it (libcudart-8774224f.so.11.0). */
static const char *library_of(const char *name)
{
	return name[2] == 'd' ? "libcudart" : RW_LIBCUDA;
}

void *rw_real(void **cache, const char *name, const void *own)
{
	void *found = __atomic_load_n(cache, __ATOMIC_ACQUIRE);

	/* A failure is not kept: CUDA may be loaded later. */
	if (found == NULL) {
		found = rw_find(name, library_of(name), own);
		/* Somebody may have it in his own file, and show it. */
		if (found == NULL)
			found = rw_find(name, "", own);
		__atomic_store_n(cache, found, __ATOMIC_RELEASE);
	}
	return found;
}

enum { UNKNOWN, YES, NO };

static int runtime, alloc, create;

static bool holds(int *known, bool (*question)(const char *, const char *, const void *), const char *name,
		  const void *own)
{
	int answer = __atomic_load_n(known, __ATOMIC_RELAXED);

	if (answer == UNKNOWN) {
		answer = question(name, library_of(name), own) ? YES : NO;
		__atomic_store_n(known, answer, __ATOMIC_RELAXED);
	}
	return answer == YES;
}

bool rw_is_alone_with_runtime(void)
{
	return holds(&runtime, rw_is_next, "cudaMalloc", (const void *)cudaMalloc);
}

bool rw_is_alone_with_driver(void)
{
	return holds(&alloc, rw_is_alone, "cuMemAlloc_v2", (const void *)cuMemAlloc_v2) &&
	       holds(&create, rw_is_alone, "cuMemCreate", (const void *)cuMemCreate);
}

static bool is_no(const int *known)
{
	return __atomic_load_n(known, __ATOMIC_RELAXED) == NO;
}

bool rw_is_not_alone(void)
{
	return is_no(&runtime) || is_no(&alloc) || is_no(&create);
}
