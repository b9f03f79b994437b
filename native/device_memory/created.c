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

/* --- with the lock held --- */

static void drop(struct rw_created *one)
{
	if (--one->references == 0)
		free(one);
}

/* What a restore has brought only the library can take out: it is told for as long as it may be there. */
static void settle(struct rw_created *one)
{
	bool there = one->imported && !one->entered && (one->left || one->address != 0 || one->holds > 0);

	if (there != one->counted)
		rw_count_loose(one->size, there);
	one->counted = there;
}

static void end_name(struct rw_created *one)
{
	rw_index_remove(&names, one->name);
	one->name = 0;
	one->holds = 0;
	settle(one);
	drop(one);
}

/* What has `number` for its name, unless the driver has given the number anew: then the program has released it, by a call
 * that was not seen, or that is about to return. */
static struct rw_created *find_other(uint64_t number)
{
	struct rw_created *one = rw_index_find(&names, number);

	if (one == NULL || one->actual != number)
		return one;
	end_name(one);
	return NULL;
}

/* By a look at all. */
static struct rw_created *find_actual(uint64_t number)
{
	for (size_t at = 0; at < names.room; at++) {
		struct rw_created *one = names.slots[at].value;

		if (one != NULL && one->actual == number)
			return one;
	}
	return NULL;
}

/* There is room for it. No handle of the driver's is odd: they are addresses of structures. */
static void put_name(struct rw_created *one)
{
	one->name = one->actual;
	if (rw_index_find(&names, one->name) != NULL)
		one->name++;
	while (rw_index_find(&names, one->name) != NULL)
		one->name += 2;
	one->holds = 1;
	one->references++;
	rw_index_put(&names, one->name, one);
}

/* --- without --- */

bool rw_name(uint64_t *handle, uint64_t size, const struct rw_kind *kind)
{
	if (kind == NULL && rw_index_is_empty(&names))
		return true;
	struct rw_created *new = calloc(1, sizeof(*new));
	if (new == NULL)
		return false;
	lock();
	bool grown = rw_index_grow(&names, 1), taken = find_other(*handle) != NULL;
	if (grown && (taken || kind != NULL)) {
		new->actual = *handle;
		new->size = size;
		new->left = kind == NULL;
		if (kind != NULL)
			new->kind = *kind;
		put_name(new);
		*handle = new->name;
		new = NULL;
	}
	unlock();
	free(new);
	return grown || (!taken && kind == NULL);
}

/* One that is held as often as it is known cannot be freed meanwhile; nor is its number another's. */
bool rw_name_again(uint64_t *handle, uint64_t address)
{
	struct rw_allocation *entry = rw_hold_created(address);

	lock();
	bool grown = rw_index_grow(&names, 1);
	struct rw_created *one = entry != NULL ? entry->created : NULL;
	/* Not found is one that another thread tries to unmap, and is about to enter again. */
	if (one == NULL || one->actual != *handle)
		one = find_actual(*handle);
	bool known = one != NULL;
	if (known && one->holds > 0)
		one->holds++;
	else if (known && grown)
		put_name(one);
	bool named = known && one->holds > 0;
	if (named) {
		*handle = one->name;
		settle(one);
	}
	unlock();
	if (entry != NULL)
		rw_let_go(entry);
	return known ? named : rw_name(handle, 0, NULL);
}

bool rw_is_name(uint64_t handle)
{
	if (rw_index_is_empty(&names))
		return false;
	lock();
	bool taken = find_other(handle) != NULL;
	unlock();
	return taken;
}

struct rw_created *rw_find_created(uint64_t handle)
{
	if (rw_index_is_empty(&names))
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

/* Of one that was taken out, where its bytes were counted. */
static void end_entry(struct rw_allocation *entry, bool left)
{
	struct rw_created *one = entry->created;

	bool imported = (entry->state[0] & RW_IMPORTED) != 0;

	lock();
	/* It may not have been noted yet that it was entered. */
	if (imported && one->counted)
		rw_count_loose(one->size, false);
	one->address = 0;
	one->entered = false;
	one->imported = one->counted = imported;
	one->left = one->left || left;
	settle(one);
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
	settle(one);
	unlock();
	/* Not found is one that is about to be entered, or entered again: who does that looks at `left` afterwards. */
	if (address != 0)
		rw_leave(rw_take_out_created(address, one->size));
}

/* The entry is the table's then, and may be gone; false if there is no memory, or one that begins there. */
static bool enter(struct rw_created *one, struct rw_allocation *entry)
{
	uint64_t address = entry->address, size = entry->size;

	if (!rw_insert(entry))
		return false;
	lock();
	bool left = one->left;
	unlock();
	if (left)
		rw_leave(rw_take_out_created(address, size));
	return true;
}

void rw_unmapped(struct rw_allocation *list, bool done)
{
	for (struct rw_allocation *next; list != NULL; list = next) {
		struct rw_created *one = list->created;
		uint64_t imported = (list->state[0] & RW_IMPORTED) != 0 ? list->size : 0;

		next = list->next;
		lock();
		one->references++;
		unlock();
		if (done)
			end_entry(list, false);
		else if (enter(one, list))
			rw_count_loose(imported, false);
		else
			end_entry(list, true);
		rw_drop_created(one);
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
		entry->device = (uint32_t)one->kind.location.id;
		entry->state[0] = one->imported ? RW_IMPORTED : 0;
	}
	unlock();
	return first;
}

/* Only now are its bytes told by the table. */
static void note_entry(struct rw_created *one)
{
	lock();
	if (one->address != 0)
		one->entered = true;
	settle(one);
	unlock();
}

static void give_up_entry(struct rw_created *one, struct rw_allocation *entry)
{
	lock();
	one->left = true;
	one->address = 0;
	settle(one);
	drop(one);
	unlock();
	free(entry);
}

void rw_mapped(struct rw_created *one, uint64_t address, uint64_t size)
{
	struct rw_allocation *entry = rw_new_created(one, address, size);

	if (!begin_entry(one, entry)) {
		free(entry);
		rw_leave_created(one);
		return;
	}
	if (!enter(one, entry)) {
		/* What the table has there was unmapped by a call that was not seen; or there is no memory. */
		rw_leave(rw_take_out_created(address, size));
		if (!enter(one, entry)) {
			give_up_entry(one, entry);
			return;
		}
	}
	note_entry(one);
}

/* Where its number was given out again meanwhile, it has no name any more. */
void rw_released(struct rw_created *one)
{
	lock();
	if (one->holds == 1)
		end_name(one);
	else if (one->holds > 0)
		one->holds--;
	unlock();
}

void rw_forget_created(void)
{
	names = (struct rw_index){ 0 };
}
