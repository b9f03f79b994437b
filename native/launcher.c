/* rewarm-runc: stands where containerd, CRI-O or Docker expect runc, and is runc by execv for all that rewarm has no
 * part in.
 *
 * Only three calls can be rewarm's: `create` of a bundle whose config.json holds a rewarm.dev/ annotation, and
 * `create`, `start` and `delete` of a container that has a container directory. Those go to Python, with the command
 * line as it came; everything else has to cost no more than runc does. Descriptors and environment go through
 * untouched. Only the `start` of a restored container is answered here, where its `create` has prepared that.
 */
#include "argv.h"
#include "common.h"
#include "runclog.h"
#include "settings.h"
#include "start.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>

enum {
	CONFIG_LIMIT = 64 << 20,
	EXIT_NOT_FOUND = 127, /* as shells say it */
	EXIT_NOT_RUN = 126,
};

/* Who is running: found through /proc, since argv[0] is what the caller likes and the path may go through links. */
struct self {
	char path[PATH_MAX];
	char python[PATH_MAX + NAME_MAX + sizeof("/venvs//bin/python3")];
	struct stat status;
};

static int self_locate(struct self *self)
{
	static const char deleted[] = " (deleted)";
	ssize_t length = readlink("/proc/self/exe", self->path, sizeof(self->path) - 1);
	size_t end;
	char *slash;

	if (length < 0 || stat("/proc/self/exe", &self->status) < 0)
		return -errno;
	self->path[length] = '\0';

	/* An upgrade may have replaced the file since execve: its place is still this prefix. */
	end = (size_t)length - (sizeof(deleted) - 1);
	if ((size_t)length > sizeof(deleted) && strcmp(self->path + end, deleted) == 0 && access(self->path, F_OK) < 0)
		self->path[end] = '\0';

	strcpy(self->python, self->path);
	for (int up = 0; up < 2; up++) {
		slash = strrchr(self->python, '/');
		if (slash == NULL)
			return -ENOENT; /* directly under the root directory: that is no installed prefix */
		*slash = '\0';
	}
	strcat(self->python, "/venv/bin/python3");
	return 0;
}

/* `venv` is a link to the directory of one version, and an upgrade renames it: a process that was started by the link
 * would import what it has not yet imported from another version. The directory itself stays while somebody uses it
 * (install.sh). What is not such a link is taken as it is. */
static void self_settle(struct self *self)
{
	static const char link[] = "/venv", program[] = "/bin/python3", versions[] = "venvs/";
	const size_t prefix = strlen(self->python) - (sizeof(link) - 1) - (sizeof(program) - 1);
	char target[NAME_MAX + sizeof(versions)];
	char path[sizeof(self->python)];
	ssize_t length;
	int size;

	memcpy(path, self->python, prefix);
	strcpy(path + prefix, link);
	length = readlink(path, target, sizeof(target) - 1);
	if (length < 0)
		return;
	target[length] = '\0';
	if (strncmp(target, versions, sizeof(versions) - 1) != 0 || strchr(target + sizeof(versions) - 1, '/') != NULL)
		return;
	size = snprintf(path, sizeof(path), "%.*s/%s%s", (int)prefix, self->python, target, program);
	if (size > 0 && (size_t)size < sizeof(path))
		strcpy(self->python, path);
}

/* filepath.Abs, which runc applies to --root: lexically, symlinks stay. Returns NULL when memory is out. */
static char *absolute_path(const char *path)
{
	autofree char *cwd = path[0] == '/' ? strdup("") : getcwd(NULL, 0);
	autofree char *joined = cwd != NULL ? format_text("%s/%s", cwd, path) : NULL;
	char *clean, *end, *rest, *part;

	if (joined == NULL)
		return NULL;
	clean = malloc(strlen(joined) + 2);
	if (clean == NULL)
		return NULL;
	end = clean;
	*end = '\0';
	for (rest = joined; (part = strsep(&rest, "/")) != NULL;) {
		if (part[0] == '\0' || strcmp(part, ".") == 0)
			continue;
		if (strcmp(part, "..") != 0) {
			*end++ = '/';
			end = stpcpy(end, part);
			continue;
		}
		while (end > clean && *--end != '/')
			;
		*end = '\0';
	}
	return clean;
}

/* The name that the Python side gives a runc root under the state directory: systemd's path escaping. */
static char *escape_root(const char *root)
{
	autofree char *path = absolute_path(root);
	char *escaped, *out;

	if (path == NULL)
		return NULL;
	escaped = malloc(strlen(path) * 4 + 1);
	if (escaped == NULL)
		return NULL;
	out = escaped;
	for (const char *in = path[0] == '/' ? path + 1 : path; *in != '\0'; in++) {
		if (*in == '-')
			out = stpcpy(out, "\\x2d");
		else
			*out++ = *in == '/' ? '-' : *in;
	}
	*out = '\0';
	return escaped;
}

/* Ids that could name another directory are runc's to refuse. */
static bool is_name(const char *id)
{
	return id != NULL && id[0] != '\0' && strchr(id, '/') == NULL && strcmp(id, ".") != 0 && strcmp(id, "..") != 0;
}

/* Returns NULL when memory is out; the caller frees it. */
static char *container_directory(const struct call *call, const struct settings *settings)
{
	autofree char *root = escape_root(call->root);

	return root == NULL ? NULL : format_text("%s/containers/%s/%s", settings->state_dir, root, call->id);
}

/* Whether a process that was killed while it made or removed the directory has left one named `path`~PID. */
static bool has_leftovers(const char *path)
{
	const char *name = strrchr(path, '/') + 1;
	const size_t length = strlen(name);
	autofree char *parent = strndup(path, (size_t)(name - path));
	autoclosedir DIR *directory = parent != NULL ? opendir(parent) : NULL;
	const struct dirent *entry;

	while (directory != NULL && (entry = readdir(directory)) != NULL)
		if (strncmp(entry->d_name, name, length) == 0 && entry->d_name[length] == '~')
			return true;
	return false;
}

static bool has_container_directory(const struct call *call, const struct settings *settings)
{
	autofree char *path = NULL;
	struct stat status;

	if (!is_name(call->id))
		return false;
	path = container_directory(call, settings);
	if (path == NULL)
		return true; /* unknown: Python looks again */
	if (lstat(path, &status) == 0)
		return true;
	if (errno == ENOENT)
		return has_leftovers(path);
	/* EACCES: who may not look is not root, and rewarm made no container for them. */
	return errno != ENOTDIR && errno != ENAMETOOLONG && errno != EACCES;
}

/* Bytes, not JSON: a key under rewarm.dev/ cannot be there without them, and a false alarm costs only Python's start.
 * JSON may write the slash as \/ or \u002f; that an encoder escapes the letters before it is not known of any. */
static bool mentions_rewarm(const struct file_text *config)
{
	static const char prefix[] = "rewarm.dev";
	const size_t length = sizeof(prefix) - 1;
	const char *at = config->bytes;
	const char *end = config->bytes + config->size;

	while ((at = memmem(at, (size_t)(end - at), prefix, length)) != NULL) {
		at += length;
		if (*at == '/' || *at == '\\')
			return true;
	}
	return false;
}

/* What cannot be read here cannot be read by runc either, whose error its callers know. */
static bool bundle_mentions_rewarm(const struct call *call)
{
	autofree char *path = format_text("%s/config.json", call->bundle);
	autofree char *bytes = NULL;
	struct file_text config;

	if (path == NULL || read_file(path, CONFIG_LIMIT, &config) < 0)
		return false;
	bytes = config.bytes;
	return mentions_rewarm(&config);
}

static bool is_for_python(const struct call *call, const struct settings *settings)
{
	if (call->malformed)
		return false;
	if (call_is(call, "create"))
		return bundle_mentions_rewarm(call) || has_container_directory(call, settings);
	if (call_is(call, "start") || call_is(call, "delete"))
		return has_container_directory(call, settings);
	return false;
}

/* Whether that is done; if not, it is Python's like any other call. */
static bool start_without_python(const struct call *call, const struct settings *settings)
{
	autofree char *root = NULL;
	autofree char *container = NULL;
	autofree char *directory = NULL;

	if (call->malformed || !call->only_id || !call_is(call, "start") || !is_name(call->id))
		return false;
	directory = container_directory(call, settings);
	root = absolute_path(call->root);
	if (root != NULL)
		container = format_text("%s/%s", root, call->id);
	return directory != NULL && container != NULL && start_restored(call, directory, container);
}

/* Not -m: runpy takes time of its own. What is imported stays, so looking for garbage among it, as Python does by
 * default every 700 objects, finds none. */
static const char python_code[] = "import gc; gc.set_threshold(100_000); from rewarm import runtime; runtime.entry()";

/* Returns -errno, or not at all. */
static int exec_python(const struct self *self, int argc, char **argv)
{
	char *const head[] = { (char *)self->python, "-I", "-c", (char *)python_code };
	const size_t heads = sizeof(head) / sizeof(head[0]);
	autofree char **words = calloc(heads + (size_t)argc, sizeof(*words)); /* argv[0] makes room for the NULL */
	int error;

	if (words == NULL || setenv("REWARM_LAUNCHER", self->path, 1) < 0)
		return -ENOMEM;
	memcpy(words, head, sizeof(head));
	memcpy(words + heads, argv + 1, (size_t)(argc - 1) * sizeof(*words));
	execv(self->python, words);
	error = -errno;
	unsetenv("REWARM_LAUNCHER");
	return error;
}

static bool is_other_program(const char *path, const struct self *self)
{
	struct stat status;

	if (stat(path, &status) < 0 || !S_ISREG(status.st_mode) || faccessat(AT_FDCWD, path, X_OK, AT_EACCESS) < 0)
		return false;
	/* rewarm-runc may be installed under runc's own name: it must find the real one, not itself for ever. */
	return status.st_dev != self->status.st_dev || status.st_ino != self->status.st_ino;
}

/* The first program of that name along PATH that is not this one; the caller frees it. Relative entries of PATH are
 * passed over: the working directory is often the bundle, which is the container's to write. */
static char *find_program(const char *name, const char *search, const struct self *self)
{
	autofree char *copy = strdup(search);
	char *rest = copy;
	char *directory;

	if (name[0] == '/')
		return is_other_program(name, self) ? strdup(name) : NULL;
	while (copy != NULL && (directory = strsep(&rest, ":")) != NULL) {
		char *path = directory[0] == '/' ? format_text("%s/%s", directory, name) : NULL;

		if (path != NULL && is_other_program(path, self))
			return path;
		free(path);
	}
	return NULL;
}

static char *join(const char *const *names)
{
	char *joined = strdup("");

	for (size_t i = 0; joined != NULL && names[i] != NULL; i++) {
		char *longer = format_text("%s%s%s", joined, i == 0 ? "" : ", ", names[i]);

		free(joined);
		joined = longer;
	}
	return joined;
}

/* Where programs are for a caller without PATH, as podman is for start and delete. */
static const char usual_places[] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/* Returns the exit status for its failure, or not at all. */
static int exec_runtime(const struct call *call, const struct settings *settings, const struct self *self, char **argv)
{
	const char *path = getenv("PATH");
	const char *search = path != NULL && path[0] != '\0' ? path : usual_places;
	autofree char *names = NULL;

	for (size_t i = 0; settings->runtimes[i] != NULL; i++) {
		autofree char *program = find_program(settings->runtimes[i], search, self);

		if (program == NULL)
			continue;
		argv[0] = program;
		execv(program, argv);
		log_error(call, "rewarm: run %s: %s", program, strerror(errno));
		return EXIT_NOT_RUN;
	}
	names = join(settings->runtimes);
	log_error(call,
		  "rewarm: find low-level runtime: none of [%s] is in PATH (%s); "
		  "install one, or name yours under runtimes in %s",
		  names != NULL ? names : "", search, settings->path);
	return EXIT_NOT_FOUND;
}

int main(int argc, char **argv)
{
	struct call call;
	struct settings settings;
	struct self self;
	autofree char *text = NULL;
	bool simple;
	int error;

	if (argc < 1)
		return EXIT_NOT_RUN;
	call_parse(argc, argv, &call);
	error = self_locate(&self);
	if (error < 0) {
		log_error(&call, "rewarm: find own file by /proc/self/exe: %s; mount /proc", strerror(-error));
		return EXIT_NOT_RUN;
	}

	simple = settings_read(&settings);
	text = settings.text;
	if (simple && start_without_python(&call, &settings))
		return EXIT_SUCCESS;
	if (!simple || is_for_python(&call, &settings)) {
		self_settle(&self);
		error = exec_python(&self, argc, argv);
		/* A restored container that waits for `start` is unknown to runc as such: there is no way on. */
		if (call_is(&call, "start") && has_container_directory(&call, &settings)) {
			log_error(&call, "rewarm: run %s: %s; install rewarm again", self.python, strerror(-error));
			return EXIT_FAILURE;
		}
		log_warning(&call, "rewarm: run %s: %s; going on without rewarm, install it again", self.python,
			    strerror(-error));
	}
	return exec_runtime(&call, &settings, &self, argv);
}
