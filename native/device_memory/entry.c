/* Programs that ask for functions of the driver by name (PyTorch, for its expandable segments) get this library's, where it
 * stands in front of them: if what they were given is what the driver's library has under that name. For another version
 * of the API it may be another function, with other parameters. */
#include "find.h"
#include "real.h"
#include "virtual.h"

#include <string.h>

INTERPOSE(cudaGetDriverEntryPoint, (const char *name, void **found, unsigned long long flags, int *status),
	  (name, found, flags, status))
INTERPOSE(cudaGetDriverEntryPoint_ptsz, (const char *name, void **found, unsigned long long flags, int *status),
	  (name, found, flags, status))
INTERPOSE(cudaGetDriverEntryPointByVersion,
	  (const char *name, void **found, unsigned version, unsigned long long flags, int *status),
	  (name, found, version, flags, status))
INTERPOSE(cudaGetDriverEntryPointByVersion_ptsz,
	  (const char *name, void **found, unsigned version, unsigned long long flags, int *status),
	  (name, found, version, flags, status))
INTERPOSE(cuGetProcAddress, (const char *name, void **found, int version, uint64_t flags), (name, found, version, flags))
INTERPOSE(cuGetProcAddress_v2, (const char *name, void **found, int version, uint64_t flags, int *status),
	  (name, found, version, flags, status))

#define DECLARE(name, parameters, arguments) INTERPOSED extern int name parameters;
RW_VIRTUAL(DECLARE)

static const struct {
	const char *name;
	void *own;
} functions[] = {
#define ENTRY(name, parameters, arguments) { #name, (void *)name },
	RW_VIRTUAL(ENTRY)
};

static int stand_in_front(int result, const char *name, void **found)
{
	if (result != CUDA_SUCCESS || name == NULL || found == NULL || *found == NULL)
		return result;
	for (size_t at = 0; at < sizeof(functions) / sizeof(functions[0]); at++) {
		/* For a later version it may be the one with a number behind its name. */
		if (strncmp(functions[at].name, name, strlen(name)) != 0)
			continue;
		void *own = functions[at].own;
		if (*found == rw_find(functions[at].name, RW_LIBCUDA, own)) {
			*found = own;
			break;
		}
	}
	return result;
}

/* The runtime of CUDA 11 has no `status`: what is passed on then is nothing that it reads. */
INTERPOSED int cudaGetDriverEntryPoint(const char *name, void **found, unsigned long long flags, int *status)
{
	return stand_in_front(real_cudaGetDriverEntryPoint(name, found, flags, status), name, found);
}

INTERPOSED int cudaGetDriverEntryPoint_ptsz(const char *name, void **found, unsigned long long flags, int *status)
{
	return stand_in_front(real_cudaGetDriverEntryPoint_ptsz(name, found, flags, status), name, found);
}

INTERPOSED int cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version,
						unsigned long long flags, int *status)
{
	return stand_in_front(real_cudaGetDriverEntryPointByVersion(name, found, version, flags, status), name, found);
}

INTERPOSED int cudaGetDriverEntryPointByVersion_ptsz(const char *name, void **found, unsigned version,
						     unsigned long long flags, int *status)
{
	return stand_in_front(real_cudaGetDriverEntryPointByVersion_ptsz(name, found, version, flags, status), name, found);
}

INTERPOSED int cuGetProcAddress(const char *name, void **found, int version, uint64_t flags)
{
	return stand_in_front(real_cuGetProcAddress(name, found, version, flags), name, found);
}

INTERPOSED int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status)
{
	return stand_in_front(real_cuGetProcAddress_v2(name, found, version, flags, status), name, found);
}
