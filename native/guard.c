/* rewarm-guard: outlives a SIGKILLed rewarm for long enough to clean up behind it.
 *
 *     rewarm-guard CONTROL_FD LIFE_FD N RECOVER_ARG*N PROGRAM ARG...
 *
 * containerd's shim runs the runtime with PDEATHSIG=SIGKILL under a timeout, and what `runc restore` and CRIU have
 * half built by then has no parent and no name. So rewarm starts them below this process, which is in a session of
 * its own and adopts every orphan of theirs (PR_SET_CHILD_SUBREAPER). It takes bytes on CONTROL_FD, a connected unix
 * socket, and says "exit N\n" or "signal N\n" there when PROGRAM has ended:
 *
 *     's'   start: the first byte; until then PROGRAM is not run, but rewarm's death is seen, so that it can begin to
 *           change what the RECOVER command puts back
 *     'c'   commit: exits with 0; the descendants go to the next subreaper above, alive or as zombies with their status
 *     'a'   abort: kills and reaps all descendants, says "clean\n", exits with 1; also valid while PROGRAM runs
 *     EOF   rewarm is dead: as for abort, then becomes the RECOVER command, if there is one
 *
 * Anything else, a commit before PROGRAM has ended included, is an abort; so is any first byte but 's'. LIFE_FD is the
 * read end of a pipe whose write end nobody has but the process that the engine waits for: its hang-up is rewarm's death
 * as well, also while a thread that no signal ends (in a FUSE server that does not answer) holds CONTROL_FD open.
 *
 * If the guard itself is killed, PROGRAM dies with it. PROGRAM has the guard's stdio, environment, signal dispositions and
 * other descriptors, but neither CONTROL_FD nor LIFE_FD. If it cannot be run, it ends with status 127 and a line on
 * stderr. Exit status 2: wrong use, nothing was started.
 */
#include "common.h"
#include "descendants.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

enum { EXIT_COMMITTED = 0, EXIT_ABORTED = 1, EXIT_USAGE = 2, EXIT_NOT_RUN = 127 };

/* How long a killed rewarm may take to its end, which closes CONTROL_FD; only one that hangs takes longer. */
enum { LAST_WORD_MS = 2000 };

enum verdict { START, COMMIT, ABORT, ORPHANED };

static const int ignored_signals[] = { SIGTERM, SIGINT, SIGHUP, SIGPIPE };
enum { IGNORED_SIGNALS = sizeof(ignored_signals) / sizeof(ignored_signals[0]) };

struct guard {
	int control;
	int life;
	char **program;
	char **recover; /* NULL-terminated, perhaps empty */
	struct sigaction before[IGNORED_SIGNALS];
	struct sigaction child_before;
};

static bool parse_number(const char *text, long limit, int *number)
{
	char *end;
	long value;

	errno = 0;
	value = strtol(text, &end, 10);
	if (errno != 0 || end == text || *end != '\0' || value < 0 || value > limit)
		return false;
	*number = (int)value;
	return true;
}

static bool is_stream(int fd)
{
	int type;
	socklen_t size = sizeof(type);

	return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type != SOCK_DGRAM;
}

/* The recovery words are copied, since PROGRAM's follow them without a NULL between. */
static bool parse(int argc, char **argv, struct guard *guard)
{
	int words;

	if (argc < 5 || !parse_number(argv[1], INT_MAX, &guard->control) ||
	    !parse_number(argv[2], INT_MAX, &guard->life) || !parse_number(argv[3], argc - 5, &words))
		return false;
	guard->program = argv + 4 + words;
	guard->recover = calloc((size_t)words + 1, sizeof(*guard->recover));
	if (guard->recover == NULL)
		return false;
	memcpy(guard->recover, argv + 4, (size_t)words * sizeof(*guard->recover));
	return true;
}

/* An ignored SIGCHLD, if inherited, would have the kernel throw exit statuses away. */
static void take_signals(struct guard *guard)
{
	const struct sigaction ignore = { .sa_handler = SIG_IGN };
	const struct sigaction standard = { .sa_handler = SIG_DFL };

	for (size_t i = 0; i < IGNORED_SIGNALS; i++)
		sigaction(ignored_signals[i], &ignore, &guard->before[i]);
	sigaction(SIGCHLD, &standard, &guard->child_before);
}

/* Ignored signals stay ignored across execve. */
static void give_signals_back(const struct guard *guard)
{
	for (size_t i = 0; i < IGNORED_SIGNALS; i++)
		sigaction(ignored_signals[i], &guard->before[i], NULL);
	sigaction(SIGCHLD, &guard->child_before, NULL);
}

/* Returns NULL, or what failed with errno set. A session of its own: a signal to rewarm's process group or a
 * closing terminal must not reach the guard. */
static const char *set_up(const struct guard *guard)
{
	int error;

	if (!is_stream(guard->control))
		return "use CONTROL_FD";
	if (fcntl(guard->control, F_SETFD, FD_CLOEXEC) < 0)
		return "close CONTROL_FD on exec";
	if (fcntl(guard->life, F_SETFD, FD_CLOEXEC) < 0)
		return "close LIFE_FD on exec";
	if (setsid() < 0 && getsid(0) != getpid())
		return "setsid";
	if (prctl(PR_SET_CHILD_SUBREAPER, 1L, 0L, 0L, 0L) < 0)
		return "become a child subreaper";
	error = descendants_check();
	errno = -error;
	return error < 0 ? "list children in /proc" : NULL;
}

static void exec_words(const struct guard *guard, char **words)
{
	give_signals_back(guard);
	execvp(words[0], words);
	dprintf(STDERR_FILENO, "rewarm-guard: run %s: %s\n", words[0], strerror(errno));
}

static pid_t start_program(const struct guard *guard)
{
	pid_t self = getpid();
	pid_t pid = fork();

	if (pid != 0)
		return pid;
	/* The guard may have died before prctl took hold: then nobody sends that signal any more. */
	if (prctl(PR_SET_PDEATHSIG, (long)SIGKILL, 0L, 0L, 0L) == 0 && getppid() == self)
		exec_words(guard, guard->program);
	_exit(EXIT_NOT_RUN);
}

/* If nobody listens any more, the next poll shows it. */
static void say(const struct guard *guard, const char *line)
{
	while (send(guard->control, line, strlen(line), MSG_NOSIGNAL) < 0 && errno == EINTR)
		;
}

/* Reaps PROGRAM and nobody else: an adopted process may be the container's, whose status belongs to whoever adopts
 * it after the commit. */
static void report_end(const struct guard *guard, pid_t pid)
{
	char line[32];
	int status;

	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return;
	if (WIFSIGNALED(status))
		snprintf(line, sizeof(line), "signal %d\n", WTERMSIG(status));
	else
		snprintf(line, sizeof(line), "exit %d\n", WEXITSTATUS(status));
	say(guard, line);
}

/* An error (a reset, because rewarm died with lines unread) is the end of the conversation too. */
static enum verdict read_verdict(const struct guard *guard, char allowed, enum verdict meaning)
{
	char byte;
	ssize_t got;

	do
		got = recv(guard->control, &byte, 1, 0);
	while (got < 0 && errno == EINTR);
	if (got <= 0)
		return ORPHANED;
	return byte == allowed ? meaning : ABORT;
}

/* The process that the engine waits for is gone, and the one that restores dies with it: as soon as it has, it changes
 * nothing any more. Of all that it may still have said, only a commit counts. */
static enum verdict read_last_word(const struct guard *guard, char allowed, enum verdict meaning)
{
	struct pollfd control = { .fd = guard->control, .events = POLLIN };
	int ready;

	do
		ready = poll(&control, 1, LAST_WORD_MS);
	while (ready < 0 && errno == EINTR);
	return ready > 0 && read_verdict(guard, allowed, meaning) == COMMIT ? COMMIT : ORPHANED;
}

static enum verdict watch_start(const struct guard *guard)
{
	struct pollfd polled[] = { { .fd = guard->control, .events = POLLIN }, { .fd = guard->life, .events = POLLIN } };

	while (poll(polled, 2, -1) < 0)
		if (errno != EINTR)
			return ABORT;
	if (polled[1].revents != 0)
		return read_last_word(guard, '\0', ORPHANED);
	return read_verdict(guard, 's', START);
}

static enum verdict watch(const struct guard *guard, pid_t pid)
{
	autoclose int program = pidfd_open(pid, 0);
	struct pollfd polled[] = {
		{ .fd = guard->control, .events = POLLIN },
		{ .fd = guard->life, .events = POLLIN },
		{ .fd = program, .events = POLLIN },
	};
	bool ended = false;

	if (program < 0)
		return ABORT;
	for (;;) {
		if (poll(polled, 3, -1) < 0) {
			if (errno != EINTR)
				return ABORT;
			continue;
		}
		if (polled[1].revents != 0)
			return read_last_word(guard, ended ? 'c' : '\0', ended ? COMMIT : ABORT);
		if (polled[0].revents != 0)
			return read_verdict(guard, ended ? 'c' : '\0', ended ? COMMIT : ABORT);
		if (polled[2].revents != 0) {
			report_end(guard, pid);
			ended = true;
			polled[2].fd = -1;
			polled[2].revents = 0;
		}
	}
}

static int conclude(const struct guard *guard, enum verdict verdict)
{
	if (verdict == COMMIT)
		return EXIT_COMMITTED;
	descendants_destroy();
	say(guard, "clean\n");
	if (verdict == ORPHANED && guard->recover[0] != NULL) {
		/* The recovery's own children are its own affair. */
		prctl(PR_SET_CHILD_SUBREAPER, 0L, 0L, 0L, 0L);
		exec_words(guard, guard->recover);
	}
	return EXIT_ABORTED;
}

int main(int argc, char **argv)
{
	struct guard guard = { .control = -1, .life = -1 };
	autofree char **recover = NULL;
	enum verdict verdict;
	const char *failed;
	pid_t pid;

	if (!parse(argc, argv, &guard)) {
		dprintf(STDERR_FILENO, "usage: rewarm-guard CONTROL_FD LIFE_FD N RECOVER_ARG*N PROGRAM ARG...\n");
		return EXIT_USAGE;
	}
	recover = guard.recover;
	failed = set_up(&guard);
	if (failed != NULL) {
		dprintf(STDERR_FILENO, "rewarm-guard: %s: %s\n", failed, strerror(errno));
		return EXIT_USAGE;
	}
	take_signals(&guard);
	verdict = watch_start(&guard);
	if (verdict != START)
		return conclude(&guard, verdict);
	pid = start_program(&guard);
	if (pid < 0) {
		dprintf(STDERR_FILENO, "rewarm-guard: fork: %s\n", strerror(errno));
		return EXIT_USAGE;
	}
	return conclude(&guard, watch(&guard, pid));
}
