/* CUDA's own functions, from behind this library, which stands in front of them. */
#ifndef REWARM_DEVICE_MEMORY_REAL_H
#define REWARM_DEVICE_MEMORY_REAL_H

#include "driver.h"

#include <stdbool.h>

#define INTERPOSED __attribute__((visibility("default")))

/* Finds it where `cache` is empty. `own` must not be taken for it. NULL if there is none (yet). */
void *rw_real(void **cache, const char *name, const void *own);

/* Defines real_NAME(), which calls the function of that name behind this library. */
#define REAL(name, own, parameters, arguments)                                     \
	static int real_##name parameters                                          \
	{                                                                          \
		static void *cache;                                                \
		int(*function) parameters = rw_real(&cache, #name, own);           \
                                                                                   \
		return function == NULL ? CUDA_ERROR_NOT_INITIALIZED : function arguments; \
	}
#define INTERPOSE(name, parameters, arguments) \
	INTERPOSED int name parameters;        \
	REAL(name, (const void *)name, parameters, arguments)

/* One that stands between the program and CUDA as well (torch_memory_saver, limiters of device memory) has its reasons to
 * see all calls. Each is looked for once. */
bool rw_is_alone_with_runtime(void);
bool rw_is_alone_with_driver(void);

/* Whether it is known already that one of these is not so. */
bool rw_is_not_alone(void);

#endif
