/* The thread calls neither the loader nor an allocator: a stopped thread of the program may hold their locks. */
#include "control.h"
#include "change.h"
#include "created.h"
#include "device.h"
#include "find.h"
#include "pieces.h"
#include "serve.h"
#include "socket.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#pragma weak pthread_create
#pragma weak pthread_attr_init
#pragma weak pthread_attr_setstacksize
#pragma weak pthread_attr_setdetachstate
#pragma weak pthread_attr_destroy
#pragma weak pthread_atfork

/* What pthread_atfork(3) of glibc, which is no function of its shared library, calls there (since 2.3.2). */
extern int __register_atfork(void (*)(void), void (*)(void), void (*)(void), void *);
#pragma weak __register_atfork

enum { STACK = 1 << 20, NAME_SIZE = 16 };

enum { NONE, STARTING, RUNNING, OVER };

static int phase;
static char name[NAME_SIZE]; /* at most what PR_SET_NAME takes */

struct entries {
	struct rw_entry *all;
	size_t count, bytes;
};

static void drop(const struct entries *entries)
{
	if (entries->all != NULL)
		munmap(entries->all, entries->bytes);
}

static int collect(struct entries *entries)
{
	int error;

	while ((error = rw_copy_entries(entries->all, entries->bytes / sizeof(struct rw_entry), &entries->count)) == -ENOSPC) {
		drop(entries);
		entries->bytes = 2 * entries->count * sizeof(struct rw_entry);
		void *room = mmap(NULL, entries->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		entries->all = room == MAP_FAILED ? NULL : room;
		if (room == MAP_FAILED)
			return -ENOMEM;
	}
	return error;
}

static void sift(struct rw_entry *all, size_t at, size_t count)
{
	for (size_t child; (child = 2 * at + 1) < count; at = child) {
		if (child + 1 < count && all[child].address < all[child + 1].address)
			child++;
		if (all[at].address >= all[child].address)
			return;
		struct rw_entry swap = all[at];
		all[at] = all[child];
		all[child] = swap;
	}
}

/* Heap sort: qsort(3) may allocate. */
static void sort(struct rw_entry *all, size_t count)
{
	for (size_t at = count / 2; at-- > 0;)
		sift(all, at, count);
	for (size_t last = count; last-- > 1;) {
		struct rw_entry swap = all[0];

		all[0] = all[last];
		all[last] = swap;
		sift(all, 0, last);
	}
}

static int ask_uuid(uint32_t device, uint8_t uuid[static 16])
{
	const struct rw_driver *driver = rw_driver();

	memset(uuid, 0, 16);
	if (driver->cuDeviceGetUuid_v2 != NULL)
		return driver->cuDeviceGetUuid_v2(uuid, (int)device);
	return driver->cuDeviceGetUuid(uuid, (int)device);
}

static void answer_list(struct rw_message *answer)
{
	__attribute__((cleanup(drop))) struct entries entries = { 0 };
	uint32_t known = UINT32_MAX;

	int error = collect(&entries);
	sort(entries.all, error == 0 ? entries.count : 0);
	for (size_t at = 0; error == 0 && at < entries.count; at++) {
		const struct rw_entry *entry = &entries.all[at];

		if (entry->device != known)
			error = ask_uuid(entry->device, answer->uuid);
		known = entry->device;
		answer->device = entry->device;
		answer->address = entry->address;
		answer->size = entry->size;
		answer->count = entry->state;
		if (error == 0)
			rw_socket_send(answer, -1);
	}
	answer->status = error;
	answer->device = 0;
	answer->address = rw_changing();
	answer->size = 0;
	answer->count = error == 0 ? entries.count : 0;
	memset(answer->uuid, 0, sizeof(answer->uuid));
}

static int answer_hello(struct rw_message *answer)
{
	struct rw_totals totals;

	int error = rw_total(&totals);
	answer->device = RW_VERSION;
	answer->size = totals.bytes;
	answer->count = totals.pieces;
	answer->address = totals.imported;
	return error;
}

static int do_piece(struct rw_message *answer, int received, int *exported)
{
	struct rw_piece piece;

	if (answer->op < RW_OWN || answer->op > RW_MAP)
		return -ENOSYS;
	int error = rw_hold_piece(answer->address, answer->size, &piece);
	if (error != 0)
		return error;
	answer->device = piece.allocation->device;
	if (answer->op == RW_OWN)
		error = rw_own(&piece);
	else if (answer->op == RW_EXPORT)
		error = rw_export(&piece, exported);
	else if (answer->op == RW_UNMAP)
		error = rw_unmap(&piece);
	else
		error = rw_map(&piece, received);
	rw_let_go(piece.allocation);
	return error;
}

static void serve(const struct rw_message *request, int received)
{
	struct rw_message answer = *request;
	int exported = -1;

	answer.status = 0;
	answer.device = 0;
	answer.count = 0;
	memset(answer.uuid, 0, sizeof(answer.uuid));
	if (request->op == RW_HELLO)
		answer.status = answer_hello(&answer);
	else if (request->op == RW_LIST)
		answer_list(&answer);
	else
		answer.status = do_piece(&answer, received, &exported);
	rw_socket_send(&answer, answer.status == 0 ? exported : -1);
	if (exported >= 0)
		close(exported);
}

static void set_phase(int value)
{
	__atomic_store_n(&phase, value, __ATOMIC_RELEASE);
}

static void *run(void *nothing)
{
	struct rw_message request;
	int received;

	prctl(PR_SET_NAME, name);
	set_phase(RUNNING);
	while (rw_socket_receive(&request, &received)) {
		serve(&request, received);
		if (received >= 0)
			close(received);
	}
	set_phase(OVER);
	rw_socket_close();
	/* Imported memory that nobody can take out any more would be lost with a checkpoint: this says so to who looks. */
	struct rw_totals totals;
	if (rw_total(&totals) != 0 || totals.imported > 0) {
		prctl(PR_SET_NAME, "rewarm-mem-lost");
		for (;;)
			poll(NULL, 0, -1);
	}
	return nothing;
}

/* The program's threads are not the child's, nor is its device memory. */
static void in_child(void)
{
	rw_stop_serving();
	set_phase(OVER);
	rw_forget_changes();
	rw_forget_all();
	rw_forget_created();
	rw_socket_close();
}

static bool watch_forks(void)
{
	static bool done;

	if (!done && __register_atfork != NULL)
		done = __register_atfork(NULL, NULL, in_child, NULL) == 0;
	else if (!done && pthread_atfork != NULL)
		done = pthread_atfork(NULL, NULL, in_child) == 0;
	return done;
}

#define FIND(function)                                                                      \
	do {                                                                                \
		find.function = function;                                                   \
		if (find.function == NULL)                                                  \
			*(void **)&find.function = rw_find(#function, "libpthread.so", NULL); \
		if (find.function == NULL)                                                  \
			return false;                                                       \
	} while (0)

/* Signals stay with the program's threads: one that is blocked in a new thread from its first moment is never handled
 * there. */
static bool start_thread(void)
{
	struct {
		__typeof__(pthread_create) *pthread_create;
		__typeof__(pthread_attr_init) *pthread_attr_init;
		__typeof__(pthread_attr_setstacksize) *pthread_attr_setstacksize;
		__typeof__(pthread_attr_setdetachstate) *pthread_attr_setdetachstate;
		__typeof__(pthread_attr_destroy) *pthread_attr_destroy;
	} find;
	union { /* larger than that of any libc */
		pthread_attr_t attributes;
		char room[256];
	} attr;
	pthread_t thread;
	sigset_t all, before;

	FIND(pthread_create);
	FIND(pthread_attr_init);
	FIND(pthread_attr_setstacksize);
	FIND(pthread_attr_setdetachstate);
	FIND(pthread_attr_destroy);
	if (find.pthread_attr_init(&attr.attributes) != 0)
		return false;
	sigfillset(&all);
	bool begun = find.pthread_attr_setstacksize(&attr.attributes, STACK) == 0 &&
		     find.pthread_attr_setdetachstate(&attr.attributes, PTHREAD_CREATE_DETACHED) == 0 &&
		     sigprocmask(SIG_BLOCK, &all, &before) == 0;
	if (begun) {
		begun = find.pthread_create(&thread, &attr.attributes, run, NULL) == 0;
		sigprocmask(SIG_SETMASK, &before, NULL);
	}
	find.pthread_attr_destroy(&attr.attributes);
	return begun;
}

/* Names have room for four digits. */
static bool set_name(int number)
{
	static const char prefix[] = "rewarm-mem-";
	char digits[4];
	size_t count = 0, at = sizeof(prefix) - 1;

	if (number < 0 || number > 9999)
		return false;
	do
		digits[count++] = (char)('0' + number % 10);
	while ((number /= 10) > 0);
	memcpy(name, prefix, at);
	while (count > 0)
		name[at++] = digits[--count];
	name[at] = 0;
	return true;
}

static void start(void)
{
	if (set_name(rw_socket_open()) && watch_forks() && start_thread())
		return;
	set_phase(OVER);
	rw_socket_close();
}

bool rw_control_start(void)
{
	int none = NONE;

	if (__atomic_compare_exchange_n(&phase, &none, STARTING, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
		start();
	while (__atomic_load_n(&phase, __ATOMIC_ACQUIRE) == STARTING)
		sched_yield();
	return __atomic_load_n(&phase, __ATOMIC_ACQUIRE) == RUNNING;
}
