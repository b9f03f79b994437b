/* Open addressing with linear probing, at most half full; what is removed leaves no mark behind. */
#include "table.h"
#include "lock.h"

#include <sched.h>
#include <stdlib.h>

enum { LEAST_SLOTS = 64, PATIENCE_MS = 100 };

struct slot {
	uint64_t address; /* 0: empty */
	struct rw_allocation *allocation;
};

static struct {
	struct rw_lock lock;
	struct slot *slots;
	size_t room, used;
} table;

static size_t place(uint64_t address)
{
	return (size_t)((address >> 12) * 0x9e3779b97f4a7c15u >> 20) & (table.room - 1);
}

static size_t find_slot(uint64_t address)
{
	size_t at = place(address);

	while (table.slots[at].address != 0 && table.slots[at].address != address)
		at = (at + 1) & (table.room - 1);
	return at;
}

static struct rw_allocation *find(uint64_t address)
{
	return table.room == 0 || address == 0 ? NULL : table.slots[find_slot(address)].allocation;
}

/* Whoever comes behind the gap and belongs before it moves into it. */
static void remove_slot(uint64_t address)
{
	size_t gap = find_slot(address), mask = table.room - 1;

	for (size_t at = (gap + 1) & mask; table.slots[at].address != 0; at = (at + 1) & mask) {
		size_t distance = (at - place(table.slots[at].address)) & mask;

		if (distance >= ((at - gap) & mask)) {
			table.slots[gap] = table.slots[at];
			gap = at;
		}
	}
	table.slots[gap] = (struct slot){ 0 };
	table.used--;
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

uint64_t rw_piece_size(const struct rw_allocation *allocation, uint32_t index)
{
	uint64_t left = allocation->size - index * RW_PIECE;

	return left < RW_PIECE ? left : RW_PIECE;
}

static void put(uint64_t address, struct rw_allocation *allocation)
{
	table.slots[find_slot(address)] = (struct slot){ .address = address, .allocation = allocation };
	table.used++;
}

bool rw_insert(struct rw_allocation *allocation)
{
	size_t need, room;
	struct slot *old = NULL, *slots = NULL;

	rw_lock_within(&table.lock, -1);
	while ((need = 2 * (table.used + allocation->pieces)) > table.room) {
		for (room = LEAST_SLOTS; room < 2 * need;)
			room *= 2;
		rw_unlock(&table.lock);
		slots = calloc(room, sizeof(*slots));
		if (slots == NULL)
			return false;
		rw_lock_within(&table.lock, -1);
		old = slots; /* another thread was faster */
		if (room > table.room) {
			size_t before = table.room;

			old = table.slots;
			table.slots = slots;
			table.room = room;
			table.used = 0;
			for (size_t at = 0; at < before; at++)
				if (old[at].address != 0)
					put(old[at].address, old[at].allocation);
		}
		rw_unlock(&table.lock);
		free(old);
		rw_lock_within(&table.lock, -1);
	}
	for (uint32_t index = 0; index < allocation->pieces; index++)
		put(allocation->address + index * RW_PIECE, allocation);
	rw_unlock(&table.lock);
	return true;
}

struct rw_allocation *rw_begin_free(uint64_t address)
{
	if (__atomic_load_n(&table.used, __ATOMIC_RELAXED) == 0)
		return NULL;
	rw_lock_within(&table.lock, -1);
	struct rw_allocation *found = find(address);
	if (found != NULL && (found->address != address || found->freeing))
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
		struct rw_allocation *one = table.slots[at].allocation;

		if (one != NULL && one->device == device && !one->freeing)
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

void rw_take_out(struct rw_allocation *allocation)
{
	rw_lock_within(&table.lock, -1);
	while (__atomic_load_n(&allocation->users, __ATOMIC_ACQUIRE) > 0) {
		rw_unlock(&table.lock);
		sched_yield();
		rw_lock_within(&table.lock, -1);
	}
	for (uint32_t index = 0; index < allocation->pieces; index++)
		remove_slot(allocation->address + index * RW_PIECE);
	rw_unlock(&table.lock);
}

bool rw_around(uint64_t address, uint64_t *start, uint64_t *asked)
{
	bool found = false;

	if (__atomic_load_n(&table.used, __ATOMIC_RELAXED) == 0)
		return false;
	rw_lock_within(&table.lock, -1);
	for (size_t at = 0; at < table.room && !found; at++) {
		const struct rw_allocation *one = table.slots[at].allocation;

		found = one != NULL && !one->freeing && address - one->address < one->size;
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
		struct rw_allocation *one = table.slots[at].allocation;

		if (one == NULL || one->device != device || one->address != table.slots[at].address)
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

static struct rw_entry entry_at(const struct slot *slot)
{
	uint32_t index = (uint32_t)((slot->address - slot->allocation->address) / RW_PIECE);

	return (struct rw_entry){ slot->address, rw_piece_size(slot->allocation, index), slot->allocation->device,
				  slot->allocation->state[index] };
}

int rw_total(struct rw_totals *totals)
{
	*totals = (struct rw_totals){ 0 };
	if (!rw_lock_within(&table.lock, PATIENCE_MS))
		return -EAGAIN;
	totals->pieces = table.used;
	for (size_t at = 0; at < table.room; at++) {
		if (table.slots[at].address == 0)
			continue;
		struct rw_entry entry = entry_at(&table.slots[at]);
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
		if (table.slots[at].address != 0)
			entries[(*count)++] = entry_at(&table.slots[at]);
	rw_unlock(&table.lock);
	return error;
}

void rw_forget_all(void)
{
	/* The lock may be held by a thread that the child does not have. The memory stays: no allocator is safe to call. */
	table.lock = (struct rw_lock){ 0 };
	table.slots = NULL;
	table.room = table.used = 0;
}
