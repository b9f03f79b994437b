/* What a program loads at run time, for itself alone: linked to the CUDA runtime, as Python's extension modules are. */
#include <stddef.h>

extern int cudaMalloc(void **pointer, size_t size), cudaFree(void *pointer);

int plugin_allocate(void **pointer, size_t size)
{
	return cudaMalloc(pointer, size);
}

int plugin_free(void *pointer)
{
	return cudaFree(pointer);
}
