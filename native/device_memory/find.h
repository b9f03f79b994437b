/* Functions of other libraries, by name. */
#ifndef REWARM_DEVICE_MEMORY_FIND_H
#define REWARM_DEVICE_MEMORY_FIND_H

#include <stdbool.h>

/* Looks behind this library, then in every loaded library whose file name begins with `library`: Python loads without
 * RTLD_GLOBAL. Never gives `own`. NULL if there is none (yet). */
void *rw_find(const char *name, const char *library, const void *own);

/* Whether the function that a call goes to from here is CUDA's own, and not one of another library that stands in front
 * of it. */
bool rw_is_next(const char *name, const char *library, const void *own);

/* Whether nobody but this library stands in front of it, whatever the order. */
bool rw_is_alone(const char *name, const char *library, const void *own);

#endif
