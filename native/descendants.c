#include "descendants.h"

#include "common.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/pidfd.h>
#include <sys/wait.h>
#include <time.h>

static void cleanup_file(FILE **file)
{
	if (*file != NULL)
		fclose(*file);
}

#define autofclose __attribute__((cleanup(cleanup_file)))

struct process {
	pid_t pid;
	pid_t parent;
};

/* A list, not recursion: how deep a tree is, is up to the container. */
struct process_list {
	struct process *items;
	size_t count;
	size_t room;
};

static bool append(struct process_list *list, pid_t pid, pid_t parent)
{
	if (list->count == list->room) {
		size_t room = list->room == 0 ? 64 : list->room * 2;
		struct process *items = reallocarray(list->items, room, sizeof(*items));

		if (items == NULL)
			return false; /* what is in the list dies first, the next pass finds the rest */
		list->items = items;
		list->room = room;
	}
	list->items[list->count++] = (struct process){ pid, parent };
	return true;
}

static void append_children_of_thread(struct process_list *list, pid_t pid, const char *tid)
{
	autofclose FILE *file = NULL;
	char path[320]; /* d_name is up to 255 bytes, as far as the compiler knows */
	int child;

	snprintf(path, sizeof(path), "/proc/%d/task/%s/children", pid, tid);
	file = fopen(path, "re");
	if (file == NULL)
		return; /* the thread has ended; its children have another parent now */
	while (fscanf(file, "%d", &child) == 1)
		if (!append(list, child, pid))
			return;
}

/* The kernel lists children by the thread that forked them. */
static void append_children(struct process_list *list, pid_t pid)
{
	autoclosedir DIR *tasks = NULL;
	struct dirent *entry;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	tasks = opendir(path);
	if (tasks == NULL)
		return;
	while ((entry = readdir(tasks)) != NULL)
		if (entry->d_name[0] != '.')
			append_children_of_thread(list, pid, entry->d_name);
}

static pid_t parent_of(pid_t pid)
{
	autofclose FILE *file = NULL;
	char path[64], line[512];
	char *behind_name;
	int parent = -1;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	file = fopen(path, "re");
	if (file == NULL || fgets(line, sizeof(line), file) == NULL)
		return -1;
	behind_name = strrchr(line, ')'); /* a name may hold spaces and brackets */
	if (behind_name == NULL || sscanf(behind_name + 1, " %*c %d", &parent) != 1)
		return -1;
	return parent;
}

/* Through a pidfd that was opened before the parent was checked, so that a pid which was given to a stranger
 * meanwhile is never hit. Who changed parents is found under the new one by the next pass. */
static void kill_checked(const struct process *process)
{
	autoclose int fd = pidfd_open(process->pid, 0);

	if (fd >= 0 && parent_of(process->pid) == process->parent)
		pidfd_send_signal(fd, SIGKILL, NULL, 0);
}

static void kill_all_seen(void)
{
	struct process_list list = { 0 };

	append_children(&list, getpid());
	for (size_t i = 0; i < list.count; i++) {
		struct process process = list.items[i]; /* the list moves as it grows */

		append_children(&list, process.pid);
		kill_checked(&process);
	}
	free(list.items);
}

int descendants_check(void)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/task/%d/children", getpid());
	return access(path, R_OK) < 0 ? -errno : 0;
}

void descendants_destroy(void)
{
	struct timespec pause = { .tv_nsec = 200 * 1000 };

	for (;;) {
		pid_t reaped;

		kill_all_seen();
		/* __WALL: a clone(2) child need not send SIGCHLD. */
		do
			reaped = waitpid(-1, NULL, WNOHANG | __WALL);
		while (reaped > 0 || (reaped < 0 && errno == EINTR));
		if (reaped < 0)
			return; /* ECHILD */
		nanosleep(&pause, NULL);
		if (pause.tv_nsec < 10 * 1000 * 1000)
			pause.tv_nsec *= 2; /* tearing down gigabytes of memory takes a while */
	}
}
