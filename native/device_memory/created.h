/* Memory that the program creates itself (cuMemCreate), and by what number it knows it.
 *
 * The driver's handle is the address of something that is gone with the memory, and another when the memory comes back: so
 * what the program has is a name. It is the driver's number at first. What takes a handle from the program asks here for
 * that of the driver's, and every handle that the driver gives the program gets its name here, also of memory that is not
 * served: the number may be one that the program knows as something else.
 *
 * Served is what is mapped once, and known to nobody else: then there is an entry of it in the table. The rest is left to
 * the driver, for good.
 *
 * The caller is in RW_CALL all the time: `actual` is changed by the control thread, while nobody is. */
#ifndef REWARM_DEVICE_MEMORY_CREATED_H
#define REWARM_DEVICE_MEMORY_CREATED_H

#include "driver.h"
#include "table.h"

struct rw_created {
	uint64_t name, actual, size;
	struct rw_kind kind; /* as the program has asked for it */
	uint64_t address;    /* of its mapping, if that is served, or 0 */
	uint32_t references; /* of the name, of the entry, and of calls under way */
	uint32_t holds;	     /* how often the program has to release it */
	bool entered;	     /* there is an entry, whose state tells whether a restore has brought the memory */
	bool imported;	     /* a restore has, and there is no entry */
	bool counted;	     /* rw_count_loose() */
	bool left;	     /* to the driver */
};

/* The name for what the driver has just made; of size `size` and kind `kind`, or NULL of what is not served. False if
 * there is no memory. */
bool rw_name(uint64_t *handle, uint64_t size, const struct rw_kind *kind);

/* The same for one handle more of what is mapped at `address`. */
bool rw_name_again(uint64_t *handle, uint64_t address);

/* Whether the program would mean something else by it. */
bool rw_is_name(uint64_t handle);

/* NULL if the name is the driver's number. */
struct rw_created *rw_find_created(uint64_t handle);
void rw_drop_created(struct rw_created *one);

/* For cleanup. */
static inline void rw_drop_found(struct rw_created *const *one)
{
	if (*one != NULL)
		rw_drop_created(*one);
}

/* After the driver has mapped it. */
void rw_mapped(struct rw_created *one, uint64_t address, uint64_t size);

/* After the driver has unmapped these, which were taken out of the table, or has not. */
void rw_unmapped(struct rw_allocation *list, bool done);

/* These, which were taken out, stay mapped. */
void rw_leave(struct rw_allocation *list);
void rw_leave_created(struct rw_created *one);

/* After the driver has released it once. */
void rw_released(struct rw_created *one);

/* In the child of a fork. */
void rw_forget_created(void);

#endif
