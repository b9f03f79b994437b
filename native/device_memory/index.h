/* Numbers to pointers: open addressing with linear probing, at most half full; what is removed leaves no mark behind.
 * With the lock held, all of it but the last. */
#ifndef REWARM_DEVICE_MEMORY_INDEX_H
#define REWARM_DEVICE_MEMORY_INDEX_H

#include "lock.h"

#include <stdint.h>

struct rw_slot {
	uint64_t number; /* 0: empty */
	void *value;
};

struct rw_index {
	struct rw_lock lock;
	struct rw_slot *slots;
	size_t room, used;
};

/* NULL if it is not there, or 0. */
void *rw_index_find(const struct rw_index *index, uint64_t number);

/* Leaves the lock for a moment; false if there is no memory for `more`. */
bool rw_index_grow(struct rw_index *index, size_t more);

/* A number that is not there, with room for it. */
void rw_index_put(struct rw_index *index, uint64_t number, void *value);

/* One that is. */
void rw_index_remove(struct rw_index *index, uint64_t number);

/* Also without the lock: never of an index that has something all the time. */
bool rw_index_is_empty(const struct rw_index *index);

#endif
