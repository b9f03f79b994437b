/* What shim/rewarm/start.py does, without Python, in the same order: a `start` that was killed can be repeated at
 * whatever point that was. The two files that `create` left for it in the container directory:
 *
 *     start                  "1\n", "init PID START\n", then "PID START\n" for each process to continue, in that order
 *     record.started.json    what record.json will be
 */
#include "start.h"

#include "common.h"
#include "runclog.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <sys/pidfd.h>

enum {
	PLAN_LIMIT = 1 << 20,
	RECORD_LIMIT = 4 << 20,
	DEEPEST = 16, /* directories in each other; CRIU's and rewarm's own are two */
};

/* The start time, in clock ticks since boot, tells a process from a later one with its pid. */
struct process {
	pid_t pid;
	unsigned long long start;
};

struct plan {
	struct process init;
	struct process *items; /* to continue, in this order; the caller frees it */
	size_t count;
};

static bool take_number(const char **text, unsigned long long limit, unsigned long long *number)
{
	const char *at = *text;
	unsigned long long value = 0;

	for (; isdigit((unsigned char)*at); at++)
		if (__builtin_mul_overflow(value, 10ULL, &value) ||
		    __builtin_add_overflow(value, (unsigned long long)(*at - '0'), &value) || value > limit)
			return false;
	if (at == *text || value == 0)
		return false;
	*text = at;
	*number = value;
	return true;
}

static bool take_character(const char **text, char wanted)
{
	if (**text != wanted)
		return false;
	++*text;
	return true;
}

static bool take_process(const char **text, struct process *process)
{
	unsigned long long pid;

	if (!take_number(text, INT_MAX, &pid) || !take_character(text, ' ') ||
	    !take_number(text, ULLONG_MAX, &process->start) || !take_character(text, '\n'))
		return false;
	process->pid = (pid_t)pid;
	return true;
}

static size_t count_lines(const struct file_text *file)
{
	size_t lines = 0;

	for (size_t i = 0; i < file->size; i++)
		lines += file->bytes[i] == '\n';
	return lines;
}

static bool take_plan(const struct file_text *file, struct plan *plan)
{
	static const char head[] = "1\ninit ";
	const char *at = file->bytes;

	if (strncmp(at, head, sizeof(head) - 1) != 0)
		return false;
	at += sizeof(head) - 1;
	if (!take_process(&at, &plan->init))
		return false;
	plan->items = calloc(count_lines(file), sizeof(*plan->items));
	if (plan->items == NULL)
		return false;
	while (*at != '\0')
		if (!take_process(&at, &plan->items[plan->count++]))
			return false;
	return at == file->bytes + file->size;
}

static bool read_plan(int directory, struct plan *plan)
{
	autofree char *bytes = NULL;
	struct file_text file;

	if (read_file_at(directory, "start", O_NOFOLLOW, PLAN_LIMIT, &file) < 0)
		return false;
	bytes = file.bytes;
	return take_plan(&file, plan);
}

/* As rewarm writes it (json.dumps): within a JSON string these quotes would be escaped. */
static bool record_says_restored(int directory)
{
	autofree char *bytes = NULL;
	struct file_text file;

	if (read_file_at(directory, "record.json", O_NOFOLLOW, RECORD_LIMIT, &file) < 0)
		return false;
	bytes = file.bytes;
	return strstr(bytes, "\"phase\": \"restored\"") != NULL;
}

static bool is_regular(int directory, const char *path)
{
	struct stat status;

	return fstatat(directory, path, &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(status.st_mode);
}

/* Returns 0 if the process is that one and no zombie, -ESRCH if it is gone, or another -errno. */
static int check_process(const struct process *process)
{
	autofree char *path = format_text("/proc/%d/stat", process->pid);
	autoclose int fd = path != NULL ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	char line[2048], state, *behind_name;
	unsigned long long start;
	ssize_t length;

	if (fd < 0)
		return path == NULL ? -ENOMEM : errno == ENOENT ? -ESRCH : -errno;
	length = read(fd, line, sizeof(line) - 1);
	if (length < 0)
		return -errno;
	line[length] = '\0';
	behind_name = strrchr(line, ')'); /* a name may hold spaces and brackets */
	if (behind_name == NULL || sscanf(behind_name + 1,
					  " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s "
					  "%llu",
					  &state, &start) != 2)
		return -EIO;
	return state != 'Z' && state != 'X' && start == process->start ? 0 : -ESRCH;
}

/* Through a pidfd that was opened before the start time was checked, so that a pid which was given to a stranger
 * meanwhile is never hit. One that is gone needs nothing. */
static int continue_process(const struct process *process)
{
	autoclose int fd = pidfd_open(process->pid, 0);
	int error;

	if (fd < 0) /* the last two: it is a thread's number now */
		return errno == ESRCH || errno == EINVAL || errno == ENOENT ? 0 : -errno;
	error = check_process(process);
	if (error == 0 && pidfd_send_signal(fd, SIGCONT, NULL, 0) < 0)
		error = -errno;
	return error == -ESRCH ? 0 : error;
}

static bool continue_all(const struct plan *plan)
{
	for (size_t i = 0; i < plan->count; i++)
		if (continue_process(&plan->items[i]) < 0)
			return false;
	return true;
}

/* runc calls a container `created`, not `running`, for as long as this file is there. */
static bool end_created(const char *container)
{
	autofree char *path = format_text("%s/exec.fifo", container);

	return path != NULL && (unlink(path) == 0 || errno == ENOENT);
}

static int empty_directory(int fd, dev_t device, int depth, const char *const *kept);

/* Neither through a link nor into another file system. Returns 0 or -errno. */
static int remove_entry(int at, const char *name, dev_t device, int depth)
{
	static const char *const nothing[] = { NULL };
	struct stat status;
	int fd, error;

	if (unlinkat(at, name, 0) == 0)
		return 0;
	if (errno != EISDIR && errno != EPERM)
		return -errno;
	if (depth == DEEPEST)
		return -ELOOP;
	fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	if (fstat(fd, &status) < 0 || status.st_dev != device) {
		close(fd);
		return -EXDEV;
	}
	error = empty_directory(fd, device, depth + 1, nothing);
	if (error < 0)
		return error;
	return unlinkat(at, name, AT_REMOVEDIR) < 0 ? -errno : 0;
}

static bool is_one_of(const char *name, const char *const *names)
{
	for (; *names != NULL; names++)
		if (strcmp(name, *names) == 0)
			return true;
	return strcmp(name, ".") == 0 || strcmp(name, "..") == 0;
}

/* Removes all but `kept` from a directory, and closes it. Returns 0 or -errno. */
static int empty_directory(int fd, dev_t device, int depth, const char *const *kept)
{
	autoclosedir DIR *directory = fdopendir(fd);
	struct dirent *entry;

	if (directory == NULL) {
		close(fd);
		return -ENOMEM;
	}
	while ((errno = 0, entry = readdir(directory)) != NULL) {
		int error = is_one_of(entry->d_name, kept) ? 0 : remove_entry(fd, entry->d_name, device, depth);

		if (error < 0)
			return error;
	}
	return -errno;
}

/* What the restored tree has read would only take memory in /run. The container runs: no failure. */
static void tidy(const struct call *call, const char *path, int directory)
{
	static const char *const kept[] = { "record.json",      "outcome.json", "trace.json", "control",
					    "device-memory.so", "engine.json",  "engine.log", NULL };
	int fd = fcntl(directory, F_DUPFD_CLOEXEC, 0);
	struct stat status;
	int error = fd < 0 || fstat(directory, &status) < 0 ? -errno : 0;

	if (error == 0)
		error = empty_directory(fd, status.st_dev, 0, kept);
	if (error < 0)
		log_warning(call, "rewarm: %s was not tidied up: %s", path, strerror(-error));
}

bool start_restored(const struct call *call, const char *directory, const char *container)
{
	autoclose int fd = open(directory, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	autofree char *state = format_text("%s/state.json", container);
	autofree struct process *items = NULL;
	struct plan plan = { .count = 0 };
	bool readable = fd >= 0 && state != NULL && read_plan(fd, &plan);

	items = plan.items;
	if (!readable || !record_says_restored(fd) || !is_regular(fd, "record.started.json") ||
	    !is_regular(AT_FDCWD, state) || check_process(&plan.init) < 0)
		return false;
	if (!continue_all(&plan) || !end_created(container) ||
	    renameat(fd, "record.started.json", fd, "record.json") < 0)
		return false;
	tidy(call, directory, fd);
	return true;
}
