/* A process for tests/unit/test_parking.py: `busy FILE WORD…`, each word a thread that counts in FILE what it does, in
 * the order of the words. SIGUSR1, which all but `sleep` take, is counted behind them. Says "ready" when all have begun.
 *
 *   work     counts
 *   driver   the same, by the name of one of libcuda's threads
 *   sleep    sleeps for an hour, and counts if that ends early
 *   pipe     copies bytes from standard input to standard output, and counts them
 *   spawn    makes threads that end at once, one after the other, which count
 *   exec     starts the program anew, again and again, and counts that
 *   vfork    waits, in the kernel, for a child that counts for as long as it is let
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 64 };

static _Atomic unsigned long *counts;
static int signals;
static char **arguments;

static void on_signal(int number)
{
	(void)number;
	counts[signals]++;
}

static void pause_ns(long nanoseconds)
{
	nanosleep(&(struct timespec){ .tv_nsec = nanoseconds }, NULL);
}

static void *work(void *count)
{
	for (;;)
		if (++*(_Atomic unsigned long *)count % 1000 == 0)
			pause_ns(50 * 1000);
	return NULL;
}

static void *driver(void *count)
{
	prctl(PR_SET_NAME, "cuda-EvtHandlr");
	return work(count);
}

static void *sleeps(void *count)
{
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, NULL);
	for (;;) {
		nanosleep(&(struct timespec){ .tv_sec = 3600 }, NULL);
		++*(_Atomic unsigned long *)count;
	}
	return NULL;
}

static void *pipes(void *count)
{
	char byte;

	while (read(0, &byte, 1) == 1 && write(1, &byte, 1) == 1)
		++*(_Atomic unsigned long *)count;
	return NULL;
}

static void *once(void *count)
{
	++*(_Atomic unsigned long *)count;
	return NULL;
}

static void *spawns(void *count)
{
	pthread_t thread;

	for (;;)
		if (pthread_create(&thread, NULL, once, count) == 0)
			pthread_join(thread, NULL);
	return NULL;
}

static void *execs(void *count)
{
	pause_ns(2 * 1000 * 1000);
	++*(_Atomic unsigned long *)count;
	setenv("AGAIN", "1", 1);
	execv("/proc/self/exe", arguments);
	return NULL;
}

static void *vforks(void *count)
{
	if (vfork() == 0)
		work(count);
	return NULL;
}

static const struct {
	const char *word;
	void *(*does)(void *count);
} kinds[] = { { "work", work },	  { "driver", driver }, { "sleep", sleeps },
	      { "pipe", pipes }, { "spawn", spawns },  { "exec", execs }, { "vfork", vforks } };

int main(int argc, char **argv)
{
	int fd = argc < 2 || argc > MOST ? -1 : open(argv[1], O_RDWR);

	if (fd < 0)
		return 2;
	counts = mmap(NULL, MOST * sizeof(*counts), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	signals = argc - 2;
	arguments = argv;
	if (counts == MAP_FAILED || signal(SIGUSR1, on_signal) == SIG_ERR)
		return 2;
	for (int at = 2; at < argc; at++)
		for (size_t kind = 0; kind < sizeof(kinds) / sizeof(*kinds); kind++) {
			pthread_t thread;

			if (strcmp(argv[at], kinds[kind].word) == 0 &&
			    pthread_create(&thread, NULL, kinds[kind].does, (void *)&counts[at - 2]) != 0)
				return 2;
		}
	if (getenv("AGAIN") == NULL)
		puts("ready");
	fflush(stdout);
	for (;;)
		pause();
}
