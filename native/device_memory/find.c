/* All of libdl is weak: glibc before 2.34 has it in a library of its own, and a program without that loads no CUDA. */
#include "find.h"
#include "driver.h"
#include "lock.h"

#include <dlfcn.h>
#include <limits.h>
#include <link.h>
#include <string.h>

#pragma weak dlsym
#pragma weak dlvsym
#pragma weak dlopen
#pragma weak dlclose
#pragma weak dlerror
#pragma weak dl_iterate_phdr

typedef void *look_up(void *handle, const char *name);

/* The C library's dlsym(3). Limiters of device memory have one of their own, which would look behind them and not behind
 * this library, so that calls went past them. NULL without libdl; musl has no dlvsym(3), and no such limiters. */
static look_up *own_dlsym(void)
{
	static look_up *known;
	static const char *const libraries[] = { "libc.so.6", "libdl.so.2" };
	static const char *const versions[] = { "GLIBC_2.34", "GLIBC_2.17", "GLIBC_2.2.5" };
	look_up *found = __atomic_load_n(&known, __ATOMIC_ACQUIRE);

	for (size_t at = 0; found == NULL && dlvsym != NULL && dlopen != NULL && at < 2; at++) {
		void *handle = dlopen(libraries[at], RTLD_NOLOAD | RTLD_LAZY);

		for (size_t version = 0; handle != NULL && found == NULL && version < 3; version++)
			found = (look_up *)dlvsym(handle, "dlsym", versions[version]);
		if (handle != NULL)
			dlclose(handle); /* the program has it for good */
	}
	if (found == NULL)
		found = dlsym;
	__atomic_store_n(&known, found, __ATOMIC_RELEASE);
	return found;
}

struct search {
	const char *library;
	size_t skip;
	char path[PATH_MAX];
};

/* Only copies the name: this runs under the loader's lock, which dlopen(3) takes as well. */
static int note_path(struct dl_phdr_info *object, size_t size, void *closure)
{
	struct search *search = closure;
	const char *name = object->dlpi_name == NULL ? "" : object->dlpi_name, *slash = strrchr(name, '/');
	const char *base = slash == NULL ? name : slash + 1;

	(void)size;
	if (strncmp(base, search->library, strlen(search->library)) != 0 || strlen(name) >= sizeof(search->path))
		return 0;
	if (search->skip > 0) {
		search->skip--;
		return 0;
	}
	memcpy(search->path, name, strlen(name) + 1);
	return 1;
}

static void *find_in(const char *name, const char *path)
{
	void *handle = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
	void *found = handle == NULL ? NULL : own_dlsym()(handle, name);

	/* Where something was found the handle stays, so that the library does too. */
	if (handle != NULL && found == NULL)
		dlclose(handle);
	return found;
}

void *rw_find(const char *name, const char *library, const void *own)
{
	struct search search = { .library = library };

	if (dlsym == NULL)
		return NULL;
	void *found = own_dlsym()(RTLD_NEXT, name);
	if (found != NULL && found != own)
		return found;
	found = NULL;
	for (size_t skip = 0; found == NULL && dl_iterate_phdr != NULL && dlopen != NULL; skip++) {
		search.skip = skip;
		if (dl_iterate_phdr(note_path, &search) == 0)
			break;
		found = find_in(name, search.path);
		if (found == own)
			found = NULL;
	}
	/* What failed here is no error of the program's, which may be about to ask for its own. */
	if (dlerror != NULL)
		dlerror();
	return found;
}

static bool is_of(void *function, const char *name, const char *library, const void *own)
{
	struct search search = { .library = library };

	/* Where none is loaded, somebody has it in his own file. */
	bool is_of = true;
	for (size_t skip = 0; function != NULL && function != own && dl_iterate_phdr != NULL && dlopen != NULL; skip++) {
		search.skip = skip;
		if (dl_iterate_phdr(note_path, &search) == 0)
			break;
		is_of = find_in(name, search.path) == function;
		if (is_of)
			break;
	}
	if (dlerror != NULL)
		dlerror();
	return is_of;
}

/* Whether who asks dlsym(3) gets the function that is in the library: one that has a dlsym of its own need not show its
 * functions in any other way. */
static bool is_shown(const char *name, const char *library)
{
	struct search search = { .library = library };
	bool shown = true;

	for (size_t skip = 0; shown && dl_iterate_phdr != NULL && dlopen != NULL; skip++) {
		search.skip = skip;
		if (dl_iterate_phdr(note_path, &search) == 0)
			break;
		void *handle = dlopen(search.path, RTLD_NOLOAD | RTLD_LAZY);
		if (handle == NULL)
			continue;
		shown = dlsym(handle, name) == own_dlsym()(handle, name);
		dlclose(handle); /* who has loaded it has it still */
	}
	if (dlerror != NULL)
		dlerror();
	return shown;
}

bool rw_is_next(const char *name, const char *library, const void *own)
{
	return dlsym == NULL || is_of(own_dlsym()(RTLD_NEXT, name), name, library, own);
}

bool rw_is_alone(const char *name, const char *library, const void *own)
{
	return dlsym == NULL || (rw_is_next(name, library, own) && is_shown(name, library) &&
				 is_shown("cuGetProcAddress", library) && is_shown("cuGetProcAddress_v2", library));
}

static const char *const names[] = {
#define NAME(name, parameters) #name,
	RW_DRIVER(NAME, NAME)
#undef NAME
};
static const bool required[] = {
#define YES(name, parameters) true,
#define NO(name, parameters) false,
	RW_DRIVER(YES, NO)
#undef YES
#undef NO
};
enum { FUNCTIONS = sizeof(names) / sizeof(names[0]) };
_Static_assert(sizeof(struct rw_driver) == FUNCTIONS * sizeof(void *), "one pointer a name");

static struct rw_driver driver;
static bool ready;
static struct rw_lock fill;

const struct rw_driver *rw_driver(void)
{
	return __atomic_load_n(&ready, __ATOMIC_ACQUIRE) ? &driver : NULL;
}

const struct rw_driver *rw_find_driver(void)
{
	void *found[FUNCTIONS];

	if (rw_driver() != NULL)
		return &driver;
	for (size_t at = 0; at < FUNCTIONS; at++) {
		found[at] = rw_find(names[at], RW_LIBCUDA, NULL);
		if (found[at] == NULL && required[at])
			return NULL;
	}
	rw_lock_within(&fill, -1);
	if (!ready) {
		memcpy(&driver, found, sizeof(driver));
		__atomic_store_n(&ready, true, __ATOMIC_RELEASE);
	}
	rw_unlock(&fill);
	return &driver;
}
