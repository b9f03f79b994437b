#include "common.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/types.h>

char *format_text_v(const char *format, va_list arguments)
{
	char *text = NULL;

	return vasprintf(&text, format, arguments) < 0 ? NULL : text;
}

char *format_text(const char *format, ...)
{
	va_list arguments;
	char *text;

	va_start(arguments, format);
	text = format_text_v(format, arguments);
	va_end(arguments);
	return text;
}

static int read_all(int fd, char *bytes, size_t size, size_t *got)
{
	*got = 0;
	while (*got < size) {
		ssize_t n = read(fd, bytes + *got, size - *got);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		*got += (size_t)n;
	}
	return 0;
}

int read_file(const char *path, size_t limit, struct file_text *out)
{
	return read_file_at(AT_FDCWD, path, 0, limit, out);
}

int read_file_at(int directory, const char *path, int flags, size_t limit, struct file_text *out)
{
	/* O_NONBLOCK: opening a FIFO that stands in the file's place must not wait for its writer. */
	autoclose int fd = openat(directory, path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | flags);
	autofree char *bytes = NULL;
	int error;

	if (fd < 0 || fstat(fd, &out->status) < 0)
		return -errno;
	if (!S_ISREG(out->status.st_mode))
		return -EINVAL;
	if ((size_t)out->status.st_size > limit)
		return -EFBIG;

	bytes = malloc((size_t)out->status.st_size + 1);
	if (bytes == NULL)
		return -ENOMEM;
	error = read_all(fd, bytes, (size_t)out->status.st_size, &out->size);
	if (error < 0)
		return error;

	bytes[out->size] = '\0';
	out->bytes = bytes;
	bytes = NULL;
	return 0;
}
