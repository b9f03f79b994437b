#include "runclog.h"

#include "common.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <time.h>

/* Quotes for JSON and for logrus' text format alike. Returns NULL when memory is out. */
static char *quote(const char *message)
{
	char *quoted = malloc(strlen(message) * 6 + 3); /* the longest escape of a byte is \u00xx */
	char *out = quoted;

	if (quoted == NULL)
		return NULL;
	*out++ = '"';
	for (const char *in = message; *in != '\0'; in++) {
		unsigned char c = (unsigned char)*in;

		if (c == '"' || c == '\\')
			out += sprintf(out, "\\%c", c);
		else if (c < 0x20 || c == 0x7f)
			out += sprintf(out, "\\u%04x", c);
		else
			*out++ = (char)c;
	}
	*out++ = '"';
	*out = '\0';
	return quoted;
}

static char *format_line(const struct call *call, const char *level, const char *message)
{
	autofree char *quoted = quote(message);
	time_t now = time(NULL);
	struct tm utc;
	char stamp[32] = "";

	if (quoted == NULL)
		return NULL;
	if (gmtime_r(&now, &utc) != NULL)
		strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%SZ", &utc);
	if (strcmp(call->log_format, "json") == 0)
		return format_text("{\"level\":\"%s\",\"msg\":%s,\"time\":\"%s\"}\n", level, quoted, stamp);
	return format_text("time=\"%s\" level=%s msg=%s\n", stamp, level, quoted);
}

static bool logs_to_stderr(const struct call *call)
{
	return call->log == NULL || call->log[0] == '\0' || strcmp(call->log, "/dev/stderr") == 0;
}

/* When memory is out the line is lost; the exit status still tells. */
static void write_line(const struct call *call, const char *level, const char *message)
{
	autofree char *line = format_line(call, level, message);
	autoclose int fd = -1;

	if (line == NULL)
		return;
	if (!logs_to_stderr(call))
		fd = open(call->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY, 0644);
	/* A log that cannot be opened must not cost the message. One write, so that lines of others do not mix in. */
	if (write(fd >= 0 ? fd : STDERR_FILENO, line, strlen(line)) < 0)
		return; /* nowhere is left to say so */
}

void log_warning(const struct call *call, const char *format, ...)
{
	autofree char *message = NULL;
	va_list arguments;

	va_start(arguments, format);
	message = format_text_v(format, arguments);
	va_end(arguments);
	if (message != NULL)
		write_line(call, "warning", message);
}

void log_error(const struct call *call, const char *format, ...)
{
	autofree char *message = NULL;
	va_list arguments;

	va_start(arguments, format);
	message = format_text_v(format, arguments);
	va_end(arguments);
	if (message == NULL)
		return;
	write_line(call, "error", message);
	if (!logs_to_stderr(call))
		dprintf(STDERR_FILENO, "%s\n", message);
}
