/* Functions of other libraries, by name. */
#ifndef REWARM_DEVICE_MEMORY_FIND_H
#define REWARM_DEVICE_MEMORY_FIND_H

/* Looks behind this library, then in every loaded library whose file name begins with `library`: Python loads without
 * RTLD_GLOBAL. Never gives `own`. NULL if there is none (yet). */
void *rw_find(const char *name, const char *library, const void *own);

#endif
