#include "created.h"
#include "index.h"

#include <stdlib.h>

static struct rw_index names;

static void lock(void)
{
	rw_lock_within(&names.lock, -1);
}

static void unlock(void)
{
	rw_unlock(&names.lock);
}

/* With the lock held. */
static void drop(struct rw_created *one)
{
	if (--one->references == 0)
		free(one);
}

static void forget_name(struct rw_created *one)
{
	rw_index_remove(&names, one->name);
	one->name = 0;
}

/* What has `number` for its name, unless the driver has given the number anew: then the program has released it by a call
 * that was not seen. */
static struct rw_created *find_other(uint64_t number)
{
	struct rw_created *one = rw_index_find(&names, number);

	if (one == NULL || one->actual != number)
		return one;
	forget_name(one);
	one->holds = 0;
	drop(one);
	return NULL;
}

bool rw_name(uint64_t *handle, uint64_t size, const struct rw_kind *kind)
{
	struct rw_created *new = NULL;

	if (kind == NULL && __atomic_load_n(&names.used, __ATOMIC_RELAXED) == 0)
		return true;
	new = calloc(1, sizeof(*new));
	if (new == NULL)
		return false;
	lock();
	bool grown = rw_index_grow(&names, 1), taken = find_other(*handle) != NULL;
	if (grown && (taken || kind != NULL)) {
		*new = (struct rw_created){ .name = *handle, .actual = *handle, .size = size, .references = 1, .holds = 1 };
		/* No handle of the driver's is odd: they are addresses of structures. */
		if (taken)
			new->name++;
		while (rw_index_find(&names, new->name) != NULL)
			new->name += 2;
		new->left = kind == NULL;
		if (kind != NULL)
			new->kind = *kind;
		rw_index_put(&names, new->name, new);
		*handle = new->name;
		new = NULL;
	}
	unlock();
	free(new);
	return grown || !taken;
}

bool rw_is_name(uint64_t handle)
{
	if (__atomic_load_n(&names.used, __ATOMIC_RELAXED) == 0)
		return false;
	lock();
	bool taken = find_other(handle) != NULL;
	unlock();
	return taken;
}

struct rw_created *rw_find_created(uint64_t handle)
{
	if (__atomic_load_n(&names.used, __ATOMIC_RELAXED) == 0)
		return NULL;
	lock();
	struct rw_created *one = rw_index_find(&names, handle);
	if (one != NULL)
		one->references++;
	unlock();
	return one;
}

void rw_drop_created(struct rw_created *one)
{
	lock();
	drop(one);
	unlock();
}

/* With the lock held: of memory that a restore has brought only the library knows how to take it out. */
static void count_loose(const struct rw_created *one, bool more)
{
	if (one->imported)
		rw_count_loose(one->size, more);
}

static void end_entry(struct rw_allocation *entry, bool left)
{
	struct rw_created *one = entry->created;

	lock();
	one->address = 0;
	one->imported = (__atomic_load_n(&entry->state[0], __ATOMIC_ACQUIRE) & RW_IMPORTED) != 0;
	one->left = one->left || left;
	if (left || one->holds > 0)
		count_loose(one, true);
	drop(one);
	unlock();
	free(entry);
}

void rw_leave(struct rw_allocation *list)
{
	for (struct rw_allocation *next; list != NULL; list = next) {
		next = list->next;
		end_entry(list, true);
	}
}

void rw_leave_created(struct rw_created *one)
{
	lock();
	uint64_t address = one->address;
	one->left = true;
	unlock();
	if (address != 0)
		rw_leave(rw_take_out_created(address, one->size));
}

void rw_unmapped(struct rw_allocation *list, bool done)
{
	for (struct rw_allocation *next; list != NULL; list = next) {
		next = list->next;
		if (done)
			end_entry(list, false);
		else if (__atomic_load_n(&list->created->left, __ATOMIC_RELAXED) || !rw_insert(list))
			end_entry(list, true);
	}
}

/* Whether the mapping is to be served, which is told to `entry`. */
static bool begin_entry(struct rw_created *one, struct rw_allocation *entry)
{
	lock();
	bool first = entry != NULL && !one->left && one->address == 0;
	if (first) {
		one->address = entry->address;
		one->references++;
		count_loose(one, false);
		entry->device = (uint32_t)one->kind.location.id;
		entry->state[0] = one->imported ? RW_IMPORTED : 0;
		one->imported = false;
	}
	unlock();
	return first;
}

void rw_mapped(struct rw_created *one, uint64_t address, uint64_t size)
{
	struct rw_allocation *entry = one->left ? NULL : rw_new_created(one, address, size);

	if (!begin_entry(one, entry)) {
		free(entry);
		rw_leave_created(one);
		return;
	}
	if (rw_insert(entry))
		return;
	/* What the table has there was unmapped by a call that was not seen; or there is no memory. */
	rw_leave(rw_take_out_created(address, size));
	if (!rw_insert(entry))
		end_entry(entry, true);
}

bool rw_begin_release(struct rw_created *one)
{
	lock();
	bool last = one->holds == 1;
	if (one->holds > 0)
		one->holds--;
	if (last)
		forget_name(one);
	unlock();
	return last;
}

void rw_end_release(struct rw_created *one, bool last)
{
	if (!last)
		return;
	lock();
	if (one->address == 0 && !one->left)
		count_loose(one, false);
	drop(one);
	unlock();
}

void rw_undo_release(struct rw_created *one, uint64_t handle, bool last)
{
	lock();
	one->holds++;
	if (last && rw_index_grow(&names, 1) && rw_index_find(&names, handle) == NULL) {
		one->name = handle;
		rw_index_put(&names, handle, one);
	}
	unlock();
}

bool rw_hold_created(struct rw_created *one, uint64_t *handle)
{
	lock();
	bool known = one->holds > 0;
	if (known) {
		one->holds++;
		*handle = one->name;
	}
	unlock();
	return known;
}

void rw_forget_created(void)
{
	names = (struct rw_index){ 0 };
}
