/* Allocations from the virtual memory API, with what cudaMalloc and cudaFree promise. */
#ifndef REWARM_DEVICE_MEMORY_SERVE_H
#define REWARM_DEVICE_MEMORY_SERVE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Smaller ones the driver packs together, and 2 MiB is the granularity of all devices so far. */
enum { RW_LEAST = 2 << 20 };

enum { RW_NOT_OURS = -1 };

/* For the calling thread's current context; false if the driver has to do it, and nothing is changed then. */
bool rw_serve(uint64_t *address, size_t size);

/* A CUresult, or RW_NOT_OURS. `free_tag` is the driver's or the runtime's own way to free. */
int rw_free(uint64_t address, int (*free_tag)(uint64_t));

/* Whether new allocations are served. `rw_stop_serving` is for good. */
bool rw_serving(void);
void rw_stop_serving(void);

/* What cudaDeviceReset and its like do to memory. */
void rw_free_device(uint32_t device);

/* After `peer` was granted access to the memory of `owner`, or lost it. */
int rw_change_peer(uint32_t owner, uint32_t peer, bool access);

#endif
