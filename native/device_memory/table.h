/* The allocations that are served, found by the address of each piece. */
#ifndef REWARM_DEVICE_MEMORY_TABLE_H
#define REWARM_DEVICE_MEMORY_TABLE_H

#include "protocol.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A piece is what is created, exported and mapped at once: small enough for many to be under way. */
#ifndef RW_PIECE
#define RW_PIECE (1ull << 30)
#endif

struct rw_created;

struct rw_allocation {
	uint64_t address, size, asked;
	uint64_t tag; /* serve.c */
	void *context;
	struct rw_created *created; /* created.h; NULL of what the library has created. It is one piece of any size. */
	struct rw_allocation *next; /* in a list */
	uint32_t device, pieces;
	uint32_t users; /* who hold it without the lock; it is not taken out before they are gone */
	int access;	/* of `created`, for its device: CUmemAccess_flags */
	bool freeing;	/* a thread is about to take it out */
	uint8_t state[]; /* enum rw_state of each piece */
};

struct rw_piece {
	struct rw_allocation *allocation;
	uint8_t *state;
	uint64_t address, size;
};

struct rw_entry {
	uint64_t address, size;
	uint32_t device, state;
};

struct rw_totals {
	uint64_t pieces, bytes, imported; /* the last also of what no entry tells */
};

/* NULL if there is no memory. The caller owns it until it is in the table, and again when it was taken out. */
struct rw_allocation *rw_new_allocation(uint64_t size);
struct rw_allocation *rw_new_created(struct rw_created *created, uint64_t address, uint64_t size);
uint64_t rw_piece_size(const struct rw_allocation *allocation, uint32_t index);

/* False if there is no memory, or one that begins there. */
bool rw_insert(struct rw_allocation *allocation);

/* The allocation that begins at `address`, or any of `device`, of those that the library has created. No other thread gets it, until rw_end_free() gives up or
 * rw_take_out() removes it from the table. */
struct rw_allocation *rw_begin_free(uint64_t address);
struct rw_allocation *rw_begin_free_of(uint32_t device);
void rw_end_free(struct rw_allocation *allocation);
void rw_take_out(struct rw_allocation *allocation);

/* Those that the program has created which have a byte of the range: a list, which is the caller's. One that is exactly
 * the range is found at once, and is the only one; else all are looked at. What a restore has brought is counted as loose
 * from then on. */
struct rw_allocation *rw_take_out_created(uint64_t address, uint64_t size);

/* The one around `address`, with one user more, by a look at all; or NULL. */
struct rw_allocation *rw_hold_created(uint64_t address);

/* For those of `device` inside the range; false if others have a byte of it. */
bool rw_note_access(uint64_t address, uint64_t size, int device, int flags);

/* Bytes of memory that a restore has brought, that may be there, and of which no entry tells. */
void rw_count_loose(uint64_t bytes, bool more);

/* The allocation around `address`, by a look at all that the library has created. */
bool rw_around(uint64_t address, uint64_t *start, uint64_t *asked);

/* All of a device that the library has created, each with one user more; NULL and 0 if there are none or no memory. The caller frees the array. */
struct rw_allocation **rw_hold_all(uint32_t device, size_t *count);
void rw_let_go(struct rw_allocation *allocation);

/* For the control thread: these wait for the lock for a moment only (-EAGAIN), and call nothing that could wait for a
 * stopped thread, malloc(3) included. A held piece is let go with rw_let_go(). */
int rw_hold_piece(uint64_t address, uint64_t size, struct rw_piece *piece);
int rw_total(struct rw_totals *totals);
int rw_copy_entries(struct rw_entry *entries, size_t room, size_t *count);

/* In the child of a fork: none of it is the child's. */
void rw_forget_all(void);

#endif
