/* Many allocations of the driver's virtual memory API at once: between two calls Python would take its lock, for which
 * tens of threads wait while memory is restored. */
#include "native.h"

/* The driver's functions come as addresses, as in lanes.c. */
typedef int create_call(uint64_t *handle, size_t size, const void *properties, unsigned long long flags);
typedef int map_call(uint64_t address, size_t size, size_t offset, uint64_t handle, unsigned long long flags);
typedef int export_call(void *shareable, uint64_t handle, int type, unsigned long long flags);

int rw_create_pieces(void *create, const void *properties, const uint64_t *sizes, size_t count, uint64_t *handles,
		     size_t *done)
{
	int error = 0;

	for (*done = 0; *done < count; (*done)++) {
		error = ((create_call *)create)(&handles[*done], sizes[*done], properties, 0);
		if (error != 0)
			break;
	}
	return error;
}

int rw_map_pieces(void *map, uint64_t address, const uint64_t *sizes, const uint64_t *handles, size_t count,
		  size_t *done)
{
	int error = 0;

	for (*done = 0; *done < count; (*done)++) {
		error = ((map_call *)map)(address, sizes[*done], 0, handles[*done], 0);
		if (error != 0)
			break;
		address += sizes[*done];
	}
	return error;
}

int rw_export_pieces(void *export, const uint64_t *handles, size_t count, int type, int *fds, size_t *done)
{
	int error = 0;

	for (*done = 0; *done < count; (*done)++) {
		error = ((export_call *)export)(&fds[*done], handles[*done], type, 0);
		if (error != 0)
			break;
	}
	return error;
}
