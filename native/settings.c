#include "settings.h"

#include "common.h"

#include <ctype.h>
#include <errno.h>

enum {
	SETTINGS_LIMIT = 1 << 20,
	FLOW_DEPTH = 32, /* more than anything here needs; a parser gives up at some depth too */
};

enum key { KEY_NONE, KEY_OTHER, KEY_RUNTIMES, KEY_STATE_DIR };

struct reader {
	struct settings *settings;
	enum key last; /* whose value an indented line would continue */
	bool seen_runtimes;
	bool seen_state_dir;
};

/* A scalar in place. `after` is behind its closing quote; `end` may be the same byte, so look at `after` before
 * terminating at `end`. */
struct scalar {
	char *start;
	char *end;
	char *after;
	bool quoted;
};

static char *skip_spaces(char *text)
{
	return text + strspn(text, " \t");
}

/* Nothing but space and a comment; YAML wants a space before a comment. */
static bool rest_is_empty(char *text)
{
	char *next = skip_spaces(text);

	return *next == '\0' || (*next == '#' && next > text);
}

static bool find_quoted(char *text, struct scalar *scalar)
{
	char quote = *text;
	char *end = strchr(text + 1, quote);

	if (end == NULL || end[1] == quote) /* goes on in the next line, or a doubled quote stands for one */
		return false;
	*scalar = (struct scalar){ text + 1, end, end + 1, true };
	return quote == '\'' || memchr(text, '\\', (size_t)(end - text)) == NULL;
}

/* Plain scalars of so few characters that no rule of YAML can make anything but these characters of them. */
static bool find_plain(char *text, struct scalar *scalar)
{
	size_t length = strspn(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./+-");

	*scalar = (struct scalar){ text, text + length, text + length, false };
	return isalpha((unsigned char)text[0]) || text[0] == '/';
}

static bool find_scalar(char *text, struct scalar *scalar)
{
	return *text == '"' || *text == '\'' ? find_quoted(text, scalar) : find_plain(text, scalar);
}

/* YAML 1.1 makes booleans and null of these, and Python's settings then refuse them by type. */
static bool is_yaml_word(const char *text)
{
	static const char *const words[] = { "true", "false", "yes", "no", "on", "off", "y", "n", "null" };

	for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++)
		if (strcasecmp(text, words[i]) == 0)
			return true;
	return false;
}

/* A name to look up in PATH, or an absolute path. */
static bool is_runtime(const struct scalar *scalar)
{
	const char *text = scalar->start;

	if (text[0] == '\0' || text[0] == '-' || (!scalar->quoted && is_yaml_word(text)))
		return false;
	return text[0] == '/' || strchr(text, '/') == NULL;
}

static bool take_runtimes(struct settings *settings, char *value)
{
	char delimiter = ',';

	if (*value++ != '[')
		return false;
	for (size_t i = 0; delimiter == ','; i++) {
		struct scalar scalar;

		if (i == MAX_RUNTIMES || !find_scalar(skip_spaces(value), &scalar))
			return false;
		value = skip_spaces(scalar.after);
		delimiter = *value++;
		*scalar.end = '\0';
		if ((delimiter != ',' && delimiter != ']') || !is_runtime(&scalar))
			return false;
		settings->runtimes[i] = scalar.start;
		settings->runtimes[i + 1] = NULL;
	}
	return rest_is_empty(value);
}

static bool take_state_dir(struct settings *settings, char *value)
{
	struct scalar scalar;

	if (!find_scalar(value, &scalar) || !rest_is_empty(scalar.after))
		return false;
	*scalar.end = '\0';
	settings->state_dir = scalar.start;
	return scalar.start[0] == '/' && !isspace((unsigned char)scalar.end[-1]);
}

/* A flow collection that closes on its line; `after` is behind it. Only of characters of which YAML can make nothing
 * but plain words and the collection's own marks, so that what closes it here closes it there. */
static bool find_flow(char *text, char **after)
{
	static const char inside[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./+- ,:";
	char closing[FLOW_DEPTH];
	size_t depth = 0;

	do {
		text += depth == 0 ? 0 : strspn(text, inside);
		if (*text == '{' || *text == '[') {
			if (depth == FLOW_DEPTH)
				return false;
			closing[depth++] = *text == '{' ? '}' : ']';
		} else if (depth == 0 || *text != closing[--depth]) {
			return false;
		}
		text++;
	} while (depth > 0);
	*after = text;
	return true;
}

/* Whether no quoted scalar goes on behind a line: it would take lines in that look like keys. A quote within a plain
 * scalar stands for itself; so between two of them nothing may be that could end such a one. Then either both stand for
 * themselves or both are a scalar's ends, and it does not matter which. */
static bool closes_quotes(char *line)
{
	for (char *at = line; *at != '\0'; at++) {
		struct scalar scalar;

		if (*at == '#') /* behind a bracket it may begin a comment, behind a letter it does not */
			return at == line || at[-1] == ' ' || at[-1] == '\t' || strpbrk(at, "\"'") == NULL;
		if (*at != '"' && *at != '\'')
			continue;
		if (!find_quoted(at, &scalar))
			return false;
		*scalar.end = '\0'; /* of a value that nobody reads */
		if (strpbrk(scalar.start, ",[]{}#?\t\\") != NULL || strstr(scalar.start, ": ") != NULL ||
		    (scalar.end > scalar.start && scalar.end[-1] == ':'))
			return false;
		at = scalar.end;
	}
	return true;
}

/* Whether the lines after this value can still be told apart from top-level keys. */
static bool pass_other(char *value)
{
	struct scalar scalar;
	char *after;

	if (*value == '"' || *value == '\'')
		return find_scalar(value, &scalar) && rest_is_empty(scalar.after);
	if (*value == '{')
		return find_flow(value, &after) && rest_is_empty(after);
	if (*value == '[')
		return closes_quotes(value);
	return *value == '\0' || strchr("&*!%@`", *value) == NULL;
}

static bool once(bool *seen)
{
	bool first = !*seen;

	*seen = true;
	return first;
}

static bool take_pair(struct reader *reader, char *line)
{
	size_t length = strspn(line, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-");
	char *value;

	if (length == 0 || line[length] != ':' || (line[length + 1] != ' ' && line[length + 1] != '\0'))
		return false;
	value = skip_spaces(line + length + 1);
	line[length] = '\0';

	if (strcmp(line, "runtimes") == 0) {
		reader->last = KEY_RUNTIMES;
		return once(&reader->seen_runtimes) && take_runtimes(reader->settings, value);
	}
	if (strcmp(line, "state_dir") == 0) {
		reader->last = KEY_STATE_DIR;
		return once(&reader->seen_state_dir) && take_state_dir(reader->settings, value);
	}
	reader->last = KEY_OTHER;
	return pass_other(value);
}

static bool take_line(struct reader *reader, char *line)
{
	char *content = skip_spaces(line);
	bool item = line[0] == '-' && (line[1] == ' ' || line[1] == '\0');

	if (strchr(line, '\r') != NULL) /* YAML breaks the line there */
		return false;
	if (*content == '\0' || *content == '#')
		return true;
	/* Deeper lines, and list items and closing brackets in the first column, belong to the key above them. */
	if (line[0] == ' ' || item || (line[0] == ']' && rest_is_empty(line + 1)))
		return reader->last == KEY_OTHER && closes_quotes(line);
	if (strncmp(line, "---", 3) == 0 && rest_is_empty(line + 3))
		return reader->last == KEY_NONE;
	return take_pair(reader, line);
}

/* YAML breaks lines at these too, and a NUL would hide the rest from the functions above. */
static bool has_odd_breaks(const struct file_text *file)
{
	return memchr(file->bytes, '\0', file->size) != NULL || strstr(file->bytes, "\xc2\x85") != NULL ||
	       strstr(file->bytes, "\xe2\x80\xa8") != NULL || strstr(file->bytes, "\xe2\x80\xa9") != NULL;
}

static bool take_text(struct settings *settings, char *text)
{
	struct reader reader = { .settings = settings, .last = KEY_NONE };
	char *line;

	while ((line = strsep(&text, "\n")) != NULL) {
		size_t length = strlen(line);

		if (length > 0 && line[length - 1] == '\r')
			line[length - 1] = '\0';
		if (!take_line(&reader, line))
			return false;
	}
	return true;
}

static const char *settings_path(void)
{
	const char *path = getenv("REWARM_CONFIG");

	return path == NULL || path[0] == '\0' ? "/etc/rewarm/config.yaml" : path;
}

bool settings_read(struct settings *settings)
{
	const struct settings defaults = {
		.path = settings_path(),
		.runtimes = { "runc" },
		.state_dir = "/run/rewarm",
	};
	struct file_text file;
	int error = read_file(defaults.path, SETTINGS_LIMIT, &file);

	*settings = defaults;
	if (error < 0)
		return error == -ENOENT;
	settings->text = file.bytes;
	if (file.status.st_uid == 0 && (file.status.st_mode & (S_IWGRP | S_IWOTH)) == 0 && !has_odd_breaks(&file) &&
	    take_text(settings, file.bytes))
		return true;
	*settings = defaults;
	free(file.bytes);
	return false;
}
