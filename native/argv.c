#include "argv.h"

#include <stddef.h>
#include <string.h>

enum { MAX_NAME = 32 };

/* A flag that takes a value, and where the value goes (NULL: nowhere). Flags without value need no entry. */
struct value_flag {
	const char *name;
	const char **target;
};

struct cursor {
	char *const *argv;
	int argc;
	int at;
};

struct flag {
	char name[MAX_NAME]; /* cut short if longer: no flag known here is */
	const char *value;   /* behind '=', else NULL */
};

static bool is_flag(const char *word)
{
	return word[0] == '-' && word[1] != '\0';
}

/* Splits "--name=value". False for what Go's flag package calls bad flag syntax. */
static bool split_flag(const char *word, struct flag *flag)
{
	const char *name = word + (word[1] == '-' ? 2 : 1);
	size_t length = strcspn(name, "=");
	size_t kept = length < MAX_NAME ? length : MAX_NAME - 1;

	if (length == 0 || name[0] == '-')
		return false;
	memcpy(flag->name, name, kept);
	flag->name[kept] = '\0';
	flag->value = name[length] == '=' ? name + length + 1 : NULL;
	return true;
}

/* Consumes the flag at the cursor, and its value if it takes one. False if runc would refuse it, or print help for
 * it. */
static bool take_flag(struct cursor *cursor, const struct value_flag *known)
{
	struct flag flag;

	if (!split_flag(cursor->argv[cursor->at++], &flag))
		return false;
	if (strcmp(flag.name, "help") == 0 || strcmp(flag.name, "h") == 0)
		return false;

	for (; known->name != NULL; known++) {
		if (strcmp(known->name, flag.name) != 0)
			continue;
		if (flag.value == NULL && cursor->at < cursor->argc)
			flag.value = cursor->argv[cursor->at++];
		if (flag.value == NULL)
			return false;
		if (known->target != NULL)
			*known->target = flag.value;
		break;
	}
	return true;
}

static bool parse_globals(struct cursor *cursor, struct call *call)
{
	const struct value_flag known[] = {
		{ "root", &call->root },
		{ "log", &call->log },
		{ "log-format", &call->log_format },
		{ "criu", NULL },
		{ "rootless", NULL },
		{ "cgroup-manager", NULL }, /* this and the next are crun's, which may be the runtime behind */
		{ "log-level", NULL },
		{ NULL, NULL },
	};

	while (cursor->at < cursor->argc && is_flag(cursor->argv[cursor->at])) {
		if (strcmp(cursor->argv[cursor->at], "--") == 0) {
			cursor->at++;
			break;
		}
		if (!take_flag(cursor, known))
			return false;
	}
	if (cursor->at < cursor->argc)
		call->command = cursor->argv[cursor->at++];
	return true;
}

static bool parse_command(struct cursor *cursor, struct call *call)
{
	const struct value_flag create[] = {
		{ "bundle", &call->bundle },
		{ "b", &call->bundle },
		{ "console-socket", NULL },
		{ "pidfd-socket", NULL },
		{ "pid-file", NULL },
		{ "preserve-fds", NULL },
		{ NULL, NULL },
	};
	const struct value_flag none[] = { { NULL, NULL } };
	const struct value_flag *known = call_is(call, "create") ? create : none;
	bool flags_ended = false;

	call->only_id = cursor->argc - cursor->at == 1 && !is_flag(cursor->argv[cursor->at]);
	while (cursor->at < cursor->argc) {
		const char *word = cursor->argv[cursor->at];

		if (!flags_ended && is_flag(word) && strcmp(word, "--") != 0) {
			if (!take_flag(cursor, known))
				return false;
			continue;
		}
		if (!flags_ended && strcmp(word, "--") == 0)
			flags_ended = true;
		else
			call->id = word;
		cursor->at++;
	}
	return true;
}

static const char *or_default(const char *value, const char *fallback)
{
	return value == NULL || value[0] == '\0' ? fallback : value;
}

void call_parse(int argc, char *const argv[], struct call *call)
{
	struct cursor cursor = { argv, argc, 1 };

	*call = (struct call){ .log_format = "text" };
	call->malformed = !parse_globals(&cursor, call) || !parse_command(&cursor, call);
	call->root = or_default(call->root, "/run/runc");
	call->bundle = or_default(call->bundle, ".");
}

bool call_is(const struct call *call, const char *command)
{
	return call->command != NULL && strcmp(call->command, command) == 0;
}
