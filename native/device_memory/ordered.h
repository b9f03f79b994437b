/* Memory that is allocated and freed in the order of a stream (cudaMallocAsync, cudaFreeAsync), from the device's default
 * pool.
 *
 * What a program keeps, weights and caches, is what a restore has to bring fast. What it allocates and frees all the time
 * the driver's pool gives it in a microsecond or two, and this library does not: so after some frees it serves no more of
 * this kind. */
#ifndef REWARM_DEVICE_MEMORY_ORDERED_H
#define REWARM_DEVICE_MEMORY_ORDERED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

bool rw_serving_ordered(void);

/* `stream` is the driver's number for the default ones. False if the driver has to do it. */
bool rw_serve_ordered(uint64_t *address, size_t size, void *stream);

enum { RW_TO_DRIVER = -2 };

/* Never waits. A CUresult, RW_NOT_OURS, also for what cudaMalloc has allocated, or RW_TO_DRIVER, which knows the error. */
int rw_free_ordered(uint64_t address, void *stream);

/* Frees what streams are done with. */
void rw_sweep_ordered(void);

/* Waits for the streams as the driver does where memory is short; false if that has freed nothing. */
bool rw_wait_ordered(void);

/* Before a reset of the device, and in the child of a fork. */
void rw_end_ordered(uint32_t device);
void rw_forget_ordered(void);

#endif
