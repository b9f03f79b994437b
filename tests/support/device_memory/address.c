/* Takes the addresses of the driver's functions: where it is not position-independent, the loader gives everybody those of
 * jumps in this file then. Allocates by the runtime, or with an argument by the driver. Prints the names of its threads. */
#include "tasks.h"

#include <stddef.h>
#include <stdint.h>

int cudaMalloc(void **pointer, size_t size);
int cudaFree(void *pointer);
int cuMemAlloc_v2(uint64_t *address, size_t size);
int cuMemFree_v2(uint64_t address);
int cuMemCreate(void *handle, size_t size, const void *kind, uint64_t flags);

void *volatile addresses[2];

int main(int count, char **arguments)
{
	void *pointer;
	uint64_t address;

	(void)arguments;
	addresses[0] = (void *)cuMemAlloc_v2;
	addresses[1] = (void *)cuMemCreate;
	if (cudaMalloc(&pointer, 1000) != 0 || cudaFree(pointer) != 0)
		return 1; /* there is a context now */
	if ((count > 1 ? cuMemAlloc_v2(&address, 4 << 20) : cudaMalloc(&pointer, 4 << 20)) != 0)
		return 1;
	print_tasks();
	return count > 1 ? cuMemFree_v2(address) : cudaFree(pointer);
}
