#include "index.h"

#include <stdlib.h>

enum { LEAST_SLOTS = 64 };

static size_t place(const struct rw_index *index, uint64_t number)
{
	/* Addresses of device memory and of what malloc(3) gives differ in their middle. */
	return (size_t)((number >> 4) * 0x9e3779b97f4a7c15u >> 20) & (index->room - 1);
}

static size_t find_slot(const struct rw_index *index, uint64_t number)
{
	size_t at = place(index, number);

	while (index->slots[at].number != 0 && index->slots[at].number != number)
		at = (at + 1) & (index->room - 1);
	return at;
}

void *rw_index_find(const struct rw_index *index, uint64_t number)
{
	return index->room == 0 || number == 0 ? NULL : index->slots[find_slot(index, number)].value;
}

static void place_in(struct rw_index *index, uint64_t number, void *value)
{
	index->slots[find_slot(index, number)] = (struct rw_slot){ number, value };
}

void rw_index_put(struct rw_index *index, uint64_t number, void *value)
{
	place_in(index, number, value);
	__atomic_add_fetch(&index->used, 1, __ATOMIC_RELAXED);
}

bool rw_index_is_empty(const struct rw_index *index)
{
	return __atomic_load_n(&index->used, __ATOMIC_RELAXED) == 0;
}

/* Whoever comes behind the gap and belongs before it moves into it. */
void rw_index_remove(struct rw_index *index, uint64_t number)
{
	size_t gap = find_slot(index, number), mask = index->room - 1;

	for (size_t at = (gap + 1) & mask; index->slots[at].number != 0; at = (at + 1) & mask) {
		size_t distance = (at - place(index, index->slots[at].number)) & mask;

		if (distance >= ((at - gap) & mask)) {
			index->slots[gap] = index->slots[at];
			gap = at;
		}
	}
	index->slots[gap] = (struct rw_slot){ 0 };
	__atomic_sub_fetch(&index->used, 1, __ATOMIC_RELAXED);
}

bool rw_index_grow(struct rw_index *index, size_t more)
{
	size_t need, room, before;

	while ((need = 2 * (index->used + more)) > index->room) {
		for (room = LEAST_SLOTS; room < 2 * need;)
			room *= 2;
		rw_unlock(&index->lock);
		struct rw_slot *slots = calloc(room, sizeof(*slots)), *old = slots;
		rw_lock_within(&index->lock, -1);
		if (slots == NULL)
			return false;
		before = index->room;
		if (room > before) { /* or another thread was faster */
			old = index->slots;
			index->slots = slots;
			index->room = room;
			for (size_t at = 0; at < before; at++)
				if (old[at].number != 0)
					place_in(index, old[at].number, old[at].value);
		}
		rw_unlock(&index->lock);
		free(old);
		rw_lock_within(&index->lock, -1);
	}
	return true;
}
