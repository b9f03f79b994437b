/* runc's command line, read as far as the launcher needs it. */
#ifndef REWARM_ARGV_H
#define REWARM_ARGV_H

#include <stdbool.h>

/* All strings point into argv (or are constants). */
struct call {
	const char *root;       /* --root, "/run/runc" when absent or empty */
	const char *log;        /* --log, NULL when absent: runc then logs to stderr */
	const char *log_format; /* --log-format, "text" when absent */
	const char *command;    /* the subcommand, NULL if there is none */
	const char *bundle;     /* --bundle of create, "." when absent or empty */
	const char *id;         /* the container id, NULL if there is none */
	bool only_id;           /* the subcommand has one word behind it, and no flags */
	bool malformed;         /* runc will refuse this line (or print help): let it */
};

/* Follows Go's flag package and urfave/cli v1, which runc 1.1 to 1.5 parse with: `-x`, `--x`, `--x=v` and `--x v`
 * are one flag, global flags end at the first word, a subcommand's flags may also follow its words, `--` ends
 * them, and the last of several wins. A flag unknown here takes no value; since the id is the last word,
 * `--new-flag value ID` is read right all the same. */
void call_parse(int argc, char *const argv[], struct call *call);

bool call_is(const struct call *call, const char *command);

#endif
