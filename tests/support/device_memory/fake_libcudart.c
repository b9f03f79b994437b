/* A libcudart.so.12 over the fake libcuda.so.1, which it loads as the real one does: late, and for itself alone. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

static void *driver;
static __thread int wanted, last;
static __thread void *current;

#define CALL(name, ...) (((int (*)())dlsym(driver, #name))(__VA_ARGS__))

static int note(int result)
{
	if (result != 0)
		last = result;
	return result;
}

/* Makes the context of the wanted device current, unless the program has one of its own. */
static int begin(void)
{
	void *context = NULL;

	if (driver == NULL)
		driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
	if (driver == NULL)
		return 35;
	CALL(cuInit, 0);
	CALL(cuCtxGetCurrent, &context);
	int device = -1;
	if (context != NULL)
		CALL(cuCtxGetDevice, &device);
	if (context != NULL && (context != current || device == wanted))
		return 0;
	int result = CALL(cuDevicePrimaryCtxRetain, &current, wanted);
	return result != 0 ? result : CALL(cuCtxSetCurrent, current);
}

API int cudaGetLastError(void)
{
	int result = last;

	last = 0;
	return result;
}

API int cudaSetDevice(int device)
{
	wanted = device;
	return 0;
}

API int cudaGetDevice(int *device)
{
	void *context = NULL;

	*device = wanted;
	if (driver != NULL)
		CALL(cuCtxGetCurrent, &context);
	if (context != NULL && context != current)
		CALL(cuCtxGetDevice, device);
	return 0;
}

API int cudaMalloc(void **pointer, size_t size)
{
	int result = begin();

	if (result == 0 && size == 0) {
		*pointer = NULL;
		return 0;
	}
	return note(result != 0 ? result : CALL(cuMemAlloc_v2, pointer, size));
}

API int cudaFree(void *pointer)
{
	int result = begin();

	return note(result != 0 || pointer == NULL ? result : CALL(cuMemFree_v2, pointer));
}

API int cudaFreeAsync(void *pointer, void *stream)
{
	int result = begin();

	return note(result != 0 || pointer == NULL ? result : CALL(cuMemFreeAsync, pointer, stream));
}

API int cudaIpcGetMemHandle(void *handle, void *pointer)
{
	int result = begin();

	return note(result != 0 ? result : CALL(cuIpcGetMemHandle, handle, pointer));
}

static int change_peer(int peer, int on)
{
	void *context = NULL;
	int result = begin();

	if (result == 0)
		result = CALL(cuDevicePrimaryCtxRetain, &context, peer);
	if (result == 0)
		result = on ? CALL(cuCtxEnablePeerAccess, context, 0) : CALL(cuCtxDisablePeerAccess, context);
	return note(result);
}

API int cudaDeviceEnablePeerAccess(int peer, unsigned flags)
{
	(void)flags;
	return change_peer(peer, 1);
}

API int cudaDeviceDisablePeerAccess(int peer)
{
	return change_peer(peer, 0);
}

API int cudaDeviceReset(void)
{
	int result = begin();

	if (result == 0)
		result = CALL(cuDevicePrimaryCtxReset_v2, wanted);
	CALL(cuCtxSetCurrent, NULL);
	current = NULL;
	return note(result);
}

API int cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags,
					 int *status)
{
	int result = begin();

	return note(result != 0 ? result : CALL(cuGetProcAddress_v2, name, found, (int)version, (uint64_t)flags, status));
}

API int cudaGetDriverEntryPoint(const char *name, void **found, unsigned long long flags, int *status)
{
	return cudaGetDriverEntryPointByVersion(name, found, 12000, flags, status);
}
