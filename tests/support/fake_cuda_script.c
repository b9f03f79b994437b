/* The fake driver's script, and its log. */
#include "fake_cuda.h"

#include <fcntl.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

const char *const CALL_NAMES[KINDS] = {"state", "thread", "lock", "checkpoint", "restore", "unlock"};

uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The number of this call among those of its kind, from 1, over all callers: rewarm's own processes and threads. */
static unsigned count(enum call_kind kind)
{
	char path[PATH_MAX];
	uint32_t counts[KINDS] = {0};

	path_of(path, "counts");
	int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
	if (file < 0)
		return 0;
	flock(file, LOCK_EX);
	ssize_t done = pread(file, counts, sizeof counts, 0);
	counts[kind]++;
	done = pwrite(file, counts, sizeof counts, 0);
	close(file);
	return done == sizeof counts ? counts[kind] : 0;
}

void read_script(struct script *script, enum call_kind kind)
{
	char line[LINE], name[32], which[16], what[32];
	unsigned number = count(kind), amount;
	FILE *file = open_for_reading("script");

	*script = (struct script){.patience_ms = 10000};
	while (file != NULL && fgets(line, sizeof line, file) != NULL) {
		amount = 0;
		int words = sscanf(line, "%31s %15s %31s %u", name, which, what, &amount);
		if (words >= 1 && strcmp(name, "nodes") == 0)
			script->nodes = true;
		else if (words >= 2 && strcmp(name, "patience") == 0)
			script->patience_ms = (unsigned)atoi(which);
		else if (words < 3 || strcmp(name, CALL_NAMES[kind]) != 0 ||
			 (strcmp(which, "*") != 0 && (unsigned)atoi(which) != number))
			continue;
		else if (strcmp(what, "sleep") == 0)
			script->sleep_ms = amount;
		else if (strcmp(what, "kill-target") == 0)
			script->kill_target = true;
		else if (strcmp(what, "kill-caller") == 0)
			script->kill_caller = true;
		else
			script->result = atoi(what);
	}
	if (file != NULL)
		fclose(file);
}

void write_log(uint64_t begin, enum call_kind kind, pid_t pid, int result, const char *map)
{
	char path[PATH_MAX], line[4096];
	int length = snprintf(line, sizeof line, "%llu %llu %d %s %d %d%s%s\n", (unsigned long long)begin,
			      (unsigned long long)now_ns(), getpid(), CALL_NAMES[kind], pid, result,
			      *map == 0 ? "" : " ", map);

	path_of(path, "log");
	int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
	/* One write: lines of threads and processes must not mix. */
	if (file < 0 || write(file, line, (size_t)length) != length)
		perror(path);
	if (file >= 0)
		close(file);
}
