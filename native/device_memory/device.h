/* What is known of each device: what its memory is made of, its primary context, and who else may reach it. */
#ifndef REWARM_DEVICE_MEMORY_DEVICE_H
#define REWARM_DEVICE_MEMORY_DEVICE_H

#include "driver.h"

#include <stdbool.h>

enum { RW_DEVICES = 64 };

/* The kind of memory to create there. */
struct rw_kind rw_kind_of(uint32_t device);

/* 0 if the device cannot do what the library needs. */
size_t rw_granularity(const struct rw_driver *driver, uint32_t device);

/* Never creates a primary context: where none is active, `context` is none. */
bool rw_is_primary(const struct rw_driver *driver, uint32_t device, const void *context);

/* Has the driver keep a block for small allocations of the current context, the device's primary one, as long as it is
 * there: in a program that has none itself, the driver would take one of 2 MiB from the GPU for each tag (serve.c), and
 * give it back, which takes as long as all else (90 us instead of 7; measured, driver 580). */
void rw_anchor(const struct rw_driver *driver, uint32_t device);

/* Before a reset: its next primary context is another, and peer access ends with this one. */
void rw_forget_device(uint32_t device);

void rw_add_peer(uint32_t owner, uint32_t peer);
void rw_remove_peer(uint32_t owner, uint32_t peer);

/* Access to mapped memory of `owner` for itself and its peers. */
int rw_set_access(const struct rw_driver *driver, uint32_t owner, uint64_t address, uint64_t size);
int rw_set_peer_access(const struct rw_driver *driver, uint32_t peer, uint64_t address, uint64_t size, int flags);

/* The devices with access, as a mask. */
uint64_t rw_accessors(uint32_t owner);

#endif
