/* What the launcher and its parts share: scope-bound cleanup, made strings, and reading one small file. */
#ifndef REWARM_COMMON_H
#define REWARM_COMMON_H

#include <dirent.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* The variable's own type is unknown here; memcpy reads its pointer without breaking the aliasing rules. */
static inline void cleanup_free(void *variable)
{
	void *pointer;

	memcpy(&pointer, variable, sizeof(pointer));
	free(pointer);
}

static inline void cleanup_close(const int *fd)
{
	if (*fd >= 0)
		close(*fd);
}

static inline void cleanup_dir(DIR **directory)
{
	if (*directory != NULL)
		closedir(*directory);
}

#define autofree __attribute__((cleanup(cleanup_free)))
#define autoclose __attribute__((cleanup(cleanup_close)))
#define autoclosedir __attribute__((cleanup(cleanup_dir)))

/* Like asprintf, whose pointer is undefined when it fails: NULL when memory is out. The caller frees it. */
__attribute__((format(printf, 1, 2))) char *format_text(const char *format, ...);
__attribute__((format(printf, 1, 0))) char *format_text_v(const char *format, va_list arguments);

struct file_text {
	char *bytes; /* NUL-terminated behind `size`; the caller frees it */
	size_t size;
	struct stat status;
};

/* Reads a regular file of at most `limit` bytes. Returns 0, or -errno (-EFBIG over the limit, -EINVAL if it is
 * no regular file) with nothing to free. A read, not a mapping: a file cut short meanwhile must not be a SIGBUS. */
int read_file(const char *path, size_t limit, struct file_text *out);

/* The same below an open directory, with more flags for open(2). */
int read_file_at(int directory, const char *path, int flags, size_t limit, struct file_text *out);

#endif
