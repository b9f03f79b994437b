/* The two node settings that the launcher needs, out of /etc/rewarm/config.yaml (or $REWARM_CONFIG). */
#ifndef REWARM_SETTINGS_H
#define REWARM_SETTINGS_H

#include <stdbool.h>

enum { MAX_RUNTIMES = 16 };

struct settings {
	const char *path;                        /* of the file, for messages */
	const char *runtimes[MAX_RUNTIMES + 1]; /* names or absolute paths, NULL at the end */
	const char *state_dir;
	char *text; /* what the strings above point into; the caller frees it */
};

/* Reads block-style top-level lines `runtimes: [a, "b"]` and `state_dir: /path`; an absent file or key is the
 * default. Other keys may have what ends before the next key beyond doubt: blocks, `{a: {b: c}}` of plain words on one
 * line, lists. False, with the defaults, for whatever else YAML allows or the settings refuse (these two as block lists,
 * anchors, tags, a key given twice, a file that others may write): then Python decides, with a real parser and an error
 * message. */
bool settings_read(struct settings *settings);

#endif
