/* Another library that is preloaded and stands in front of the CUDA runtime, as torch_memory_saver does. */
#include <dlfcn.h>
#include <stddef.h>

static int calls;

int between_calls(void)
{
	return calls;
}

int cudaMalloc(void **pointer, size_t size)
{
	int (*next)(void **, size_t) = dlsym(RTLD_NEXT, "cudaMalloc");

	if (next == NULL) {
		void *runtime = dlopen("libcudart.so.12", RTLD_NOW);

		next = runtime == NULL ? NULL : dlsym(runtime, "cudaMalloc");
	}
	calls++;
	return next == NULL ? 3 : next(pointer, size);
}
