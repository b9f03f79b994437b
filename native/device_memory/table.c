#include "table.h"
#include "index.h"

#include <sched.h>
#include <stdlib.h>

enum { PATIENCE_MS = 100 };

static struct rw_index table;
static size_t created_count; /* entries of memory that the program has created itself */
static uint64_t loose;

static struct rw_allocation *find(uint64_t address)
{
	return rw_index_find(&table, address);
}

static struct rw_allocation *at_slot(size_t at)
{
	return table.slots[at].value;
}

struct rw_allocation *rw_new_allocation(uint64_t size)
{
	uint64_t pieces = (size + RW_PIECE - 1) / RW_PIECE;
	struct rw_allocation *new = pieces > UINT32_MAX ? NULL : calloc(1, sizeof(*new) + pieces);

	if (new != NULL) {
		new->size = size;
		new->pieces = (uint32_t)pieces;
	}
	return new;
}

struct rw_allocation *rw_new_created(struct rw_created *created, uint64_t address, uint64_t size)
{
	struct rw_allocation *new = calloc(1, sizeof(*new) + 1);

	if (new != NULL) {
		new->created = created;
		new->address = address;
		new->size = size;
		new->pieces = 1;
	}
	return new;
}

uint64_t rw_piece_size(const struct rw_allocation *allocation, uint32_t index)
{
	if (allocation->created != NULL)
		return allocation->size;
	uint64_t left = allocation->size - index * RW_PIECE;

	return left < RW_PIECE ? left : RW_PIECE;
}

bool rw_insert(struct rw_allocation *allocation)
{
	rw_lock_within(&table.lock, -1);
	bool grown = rw_index_grow(&table, allocation->pieces) && find(allocation->address) == NULL;
	for (uint32_t index = 0; grown && index < allocation->pieces; index++)
		rw_index_put(&table, allocation->address + index * RW_PIECE, allocation);
	if (grown && allocation->created != NULL)
		__atomic_add_fetch(&created_count, 1, __ATOMIC_RELAXED);
	rw_unlock(&table.lock);
	return grown;
}

struct rw_allocation *rw_begin_free(uint64_t address)
{
	if (rw_index_is_empty(&table))
		return NULL;
	rw_lock_within(&table.lock, -1);
	struct rw_allocation *found = find(address);
	if (found != NULL && (found->address != address || found->freeing || found->created != NULL))
		found = NULL;
	if (found != NULL)
		found->freeing = true;
	rw_unlock(&table.lock);
	return found;
}

struct rw_allocation *rw_begin_free_of(uint32_t device)
{
	struct rw_allocation *found = NULL;

	rw_lock_within(&table.lock, -1);
	for (size_t at = 0; at < table.room && found == NULL; at++) {
		struct rw_allocation *one = at_slot(at);

		if (one != NULL && one->device == device && !one->freeing && one->created == NULL)
			found = one;
	}
	if (found != NULL)
		found->freeing = true;
	rw_unlock(&table.lock);
	return found;
}

void rw_end_free(struct rw_allocation *allocation)
{
	rw_lock_within(&table.lock, -1);
	allocation->freeing = false;
	rw_unlock(&table.lock);
}

static bool is_used(const struct rw_allocation *allocation)
{
	return __atomic_load_n(&allocation->users, __ATOMIC_ACQUIRE) > 0;
}

static void wait_outside(void)
{
	rw_unlock(&table.lock);
	sched_yield();
	rw_lock_within(&table.lock, -1);
}

void rw_take_out(struct rw_allocation *allocation)
{
	rw_lock_within(&table.lock, -1);
	while (is_used(allocation))
		wait_outside();
	for (uint32_t index = 0; index < allocation->pieces; index++)
		rw_index_remove(&table, allocation->address + index * RW_PIECE);
	rw_unlock(&table.lock);
}

static bool has_created(void)
{
	return __atomic_load_n(&created_count, __ATOMIC_RELAXED) > 0;
}

static struct rw_allocation *created_at(uint64_t address, uint64_t size)
{
	struct rw_allocation *found = find(address);

	return found != NULL && found->created != NULL && found->size == size ? found : NULL;
}

static bool touches(const struct rw_allocation *one, uint64_t address, uint64_t size)
{
	return one->address - address < size || address - one->address < one->size;
}

static void take_out_created(struct rw_allocation *one, struct rw_allocation **list)
{
	rw_index_remove(&table, one->address);
	__atomic_sub_fetch(&created_count, 1, __ATOMIC_RELAXED);
	if (one->state[0] & RW_IMPORTED)
		loose += one->size;
	one->next = *list;
	*list = one;
}

/* All that have a byte of the range; NULL if there are none, or if one is used: then the lock was left, and there may be
 * others now. */
static struct rw_allocation *find_created(uint64_t address, uint64_t size, bool *again)
{
	struct rw_allocation *list = NULL, *used = NULL;

	for (size_t at = 0; at < table.room && used == NULL; at++) {
		struct rw_allocation *one = at_slot(at);

		if (one == NULL || one->created == NULL || !touches(one, address, size))
			continue;
		if (is_used(one))
			used = one;
		one->next = list;
		list = one;
	}
	*again = used != NULL;
	if (used != NULL)
		wait_outside();
	return used != NULL ? NULL : list;
}

struct rw_allocation *rw_take_out_created(uint64_t address, uint64_t size)
{
	struct rw_allocation *list = NULL, *one, *next;
	bool again = true;

	if (!has_created())
		return NULL;
	rw_lock_within(&table.lock, -1);
	while ((one = created_at(address, size)) != NULL && is_used(one))
		wait_outside();
	if (one != NULL)
		one->next = NULL;
	while (one == NULL && again)
		one = find_created(address, size, &again);
	for (; one != NULL; one = next) {
		next = one->next;
		take_out_created(one, &list);
	}
	rw_unlock(&table.lock);
	return list;
}

struct rw_allocation *rw_hold_created(uint64_t address)
{
	struct rw_allocation *found = NULL;

	if (!has_created())
		return NULL;
	rw_lock_within(&table.lock, -1);
	for (size_t at = 0; found == NULL && at < table.room; at++) {
		struct rw_allocation *one = at_slot(at);

		if (one != NULL && one->created != NULL && touches(one, address, 1))
			found = one;
	}
	if (found != NULL)
		__atomic_add_fetch(&found->users, 1, __ATOMIC_RELAXED);
	rw_unlock(&table.lock);
	return found;
}

static bool note_access(struct rw_allocation *one, uint64_t address, uint64_t size, int device, int flags)
{
	if (one->address - address >= size || one->size > size - (one->address - address) || (int)one->device != device)
		return false;
	one->access = flags;
	return true;
}

bool rw_note_access(uint64_t address, uint64_t size, int device, int flags)
{
	bool noted = true;

	if (!has_created())
		return true;
	rw_lock_within(&table.lock, -1);
	struct rw_allocation *one = created_at(address, size);
	if (one != NULL)
		noted = note_access(one, address, size, device, flags);
	for (size_t at = 0; one == NULL && at < table.room; at++) {
		struct rw_allocation *touched = at_slot(at);

		if (touched != NULL && touched->created != NULL && touches(touched, address, size))
			noted = note_access(touched, address, size, device, flags) && noted;
	}
	rw_unlock(&table.lock);
	return noted;
}

bool rw_around(uint64_t address, uint64_t *start, uint64_t *asked)
{
	bool found = false;

	if (rw_index_is_empty(&table))
		return false;
	rw_lock_within(&table.lock, -1);
	for (size_t at = 0; at < table.room && !found; at++) {
		const struct rw_allocation *one = at_slot(at);

		found = one != NULL && !one->freeing && one->created == NULL && address - one->address < one->size;
		if (found) {
			*start = one->address;
			*asked = one->asked;
		}
	}
	rw_unlock(&table.lock);
	return found;
}

struct rw_allocation **rw_hold_all(uint32_t device, size_t *count)
{
	struct rw_allocation **all = NULL;
	size_t room = 0;

	*count = 0;
	rw_lock_within(&table.lock, -1);
	while (room < table.used) {
		room = table.used;
		rw_unlock(&table.lock);
		free(all);
		all = calloc(room, sizeof(*all));
		if (all == NULL)
			return NULL;
		rw_lock_within(&table.lock, -1);
	}
	for (size_t at = 0; at < table.room; at++) {
		struct rw_allocation *one = at_slot(at);

		if (one == NULL || one->device != device || one->created != NULL || one->address != table.slots[at].number)
			continue;
		__atomic_add_fetch(&one->users, 1, __ATOMIC_RELAXED);
		all[(*count)++] = one;
	}
	rw_unlock(&table.lock);
	return all;
}

void rw_let_go(struct rw_allocation *allocation)
{
	__atomic_sub_fetch(&allocation->users, 1, __ATOMIC_RELEASE);
}

void rw_count_loose(uint64_t bytes, bool more)
{
	rw_lock_within(&table.lock, -1);
	loose = more ? loose + bytes : loose - bytes;
	rw_unlock(&table.lock);
}

int rw_hold_piece(uint64_t address, uint64_t size, struct rw_piece *piece)
{
	int error = -ENOENT;

	if (!rw_lock_within(&table.lock, PATIENCE_MS))
		return -EAGAIN;
	struct rw_allocation *found = find(address);
	if (found != NULL) {
		uint32_t index = (uint32_t)((address - found->address) / RW_PIECE);

		*piece = (struct rw_piece){ found, &found->state[index], address, rw_piece_size(found, index) };
		error = piece->size == size ? 0 : -ENOENT;
	}
	if (error == 0)
		__atomic_add_fetch(&found->users, 1, __ATOMIC_RELAXED);
	rw_unlock(&table.lock);
	return error;
}

static struct rw_entry entry_at(size_t at)
{
	const struct rw_allocation *allocation = at_slot(at);
	uint64_t address = table.slots[at].number;
	uint32_t index = (uint32_t)((address - allocation->address) / RW_PIECE);

	return (struct rw_entry){ address, rw_piece_size(allocation, index), allocation->device, allocation->state[index] };
}

int rw_total(struct rw_totals *totals)
{
	if (!rw_lock_within(&table.lock, PATIENCE_MS))
		return -EAGAIN;
	*totals = (struct rw_totals){ .imported = loose };
	totals->pieces = table.used;
	for (size_t at = 0; at < table.room; at++) {
		if (table.slots[at].number == 0)
			continue;
		struct rw_entry entry = entry_at(at);
		totals->bytes += entry.size;
		totals->imported += (entry.state & RW_IMPORTED) != 0 ? entry.size : 0;
	}
	rw_unlock(&table.lock);
	return 0;
}

int rw_copy_entries(struct rw_entry *entries, size_t room, size_t *count)
{
	if (!rw_lock_within(&table.lock, PATIENCE_MS))
		return -EAGAIN;
	int error = table.used > room ? -ENOSPC : 0;
	*count = error == 0 ? 0 : table.used;
	for (size_t at = 0; error == 0 && at < table.room; at++)
		if (table.slots[at].number != 0)
			entries[(*count)++] = entry_at(at);
	rw_unlock(&table.lock);
	return error;
}

void rw_forget_all(void)
{
	/* The lock may be held by a thread that the child does not have. The memory stays: no allocator is safe to call. */
	table = (struct rw_index){ 0 };
	created_count = 0;
	loose = 0;
}
