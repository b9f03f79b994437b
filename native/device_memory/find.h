/* Functions of other libraries, by name. */
#ifndef REWARM_DEVICE_MEMORY_FIND_H
#define REWARM_DEVICE_MEMORY_FIND_H

#include <stdbool.h>

/* How the file name of the driver's library begins: who loads libcuda.so first (numba) gives it that name for all. */
#define RW_LIBCUDA "libcuda.so"

/* Looks behind this library, then in every loaded library whose file name begins with `library`: Python loads without
 * RTLD_GLOBAL. Never gives `own`. NULL if there is none (yet). */
void *rw_find(const char *name, const char *library, const void *own);

/* Whether the function that a call goes to from here is CUDA's own, and not one of another library that stands in front
 * of it. */
bool rw_is_next(const char *name, const char *library, const void *own);

/* The same of a function of the driver, for all ways to it: nor does anybody have a dlsym(3) that gives another, or one
 * instead of cuGetProcAddress. Who is before this library sees the program's own calls first. */
bool rw_is_alone(const char *name, const char *library, const void *own);

#endif
