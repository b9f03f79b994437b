/* A libcuda.so.1 for machines without a GPU: the process checkpoint API, whose state lies in the memory of the process
 * that is checkpointed, so that a dump carries it into another process as it does the real driver's. Which files it
 * reads and writes: fake_gpu.py. With -DTOO_OLD, a driver from before that API. */
#include "fake_cuda.h"

#include <dirent.h>
#include <signal.h>
#include <unistd.h>

static const struct {
	int code;
	const char *name, *text;
} ERRORS[] = {
	{OK, "CUDA_SUCCESS", "no error"},
	{INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
	{OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
	{NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
	{46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
	{NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
	{INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
	{OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
	{ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
	{NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
	{NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
	{NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
	{UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

EXPORT int cuGetErrorName(int error, const char **name)
{
	*name = NULL;
	for (size_t at = 0; at < sizeof ERRORS / sizeof *ERRORS; at++)
		if (ERRORS[at].code == error)
			*name = ERRORS[at].name;
	return *name == NULL ? INVALID_VALUE : OK;
}

EXPORT int cuGetErrorString(int error, const char **text)
{
	*text = NULL;
	for (size_t at = 0; at < sizeof ERRORS / sizeof *ERRORS; at++)
		if (ERRORS[at].code == error)
			*text = ERRORS[at].text;
	return *text == NULL ? INVALID_VALUE : OK;
}

#ifdef TOO_OLD

EXPORT int cuDriverGetVersion(int *version)
{
	*version = 12020;
	return OK;
}

#else

struct lock_args {
	unsigned timeout_ms, reserved0;
	uint64_t reserved1[7];
};
struct gpu_pair {
	unsigned char from[16], to[16];
};
struct restore_args {
	struct gpu_pair *pairs;
	unsigned count;
	char reserved[52];
};
_Static_assert(sizeof(struct lock_args) == 64 && sizeof(struct restore_args) == 64, "cuda.h");

EXPORT int cuDriverGetVersion(int *version)
{
	char word[64];

	node_word("cuda", word);
	*version = *word == 0 ? 13000 : atoi(word);
	return OK;
}

/* What the script does to a call before the driver does its part, and the page; a result other than OK is the end. */
static int begin(enum call_kind kind, pid_t pid, struct script *script, struct page *page)
{
	read_script(script, kind);
	usleep(script->sleep_ms * 1000);
	if (script->kill_caller)
		kill(getpid(), SIGKILL);
	if (script->kill_target && kill(pid, SIGKILL) == 0)
		while (read_page(pid, page) == OK)
			usleep(1000);
	int result = read_page(pid, page);
	if (script->result == OK || result != OK)
		return result;
	/* The one failure that the real driver was seen not to undo. */
	if (kind == RESTORE && script->result == OUT_OF_MEMORY)
		set_word(pid, offsetof(struct page, state), FAILED);
	return script->result;
}

static int set_state(pid_t pid, uint32_t state)
{
	return set_word(pid, offsetof(struct page, state), state);
}

/* The real driver leaves the work to a thread of the process, which a stop or a frozen cgroup keeps from it. */
static int wait_for_beat(pid_t pid, const struct page *before, unsigned patience_ms)
{
	uint64_t end = now_ns() + patience_ms * 1000000ull;
	struct page page;

	do {
		usleep(1000);
		int result = read_page(pid, &page);
		if (result != OK)
			return result;
		if (page.beats != before->beats)
			return OK;
	} while (now_ns() < end);
	return UNKNOWN;
}

/* A process may be between its look at the state and its call: hence the second look, after a while. */
static int lock(pid_t pid, struct page *page, unsigned timeout_ms)
{
	uint64_t end = now_ns() + timeout_ms * 1000000ull;
	int result = OK;

	if (page->state != RUNNING)
		return ILLEGAL_STATE;
	if (page->flags & MPS)
		return NOT_SUPPORTED;
	while (result == OK && (timeout_ms == 0 || now_ns() < end)) {
		bool busy = page->flags & BUSY;

		if (!busy && page->state == RUNNING)
			result = set_state(pid, LOCKED);
		else if (!busy && page->in_flight == 0)
			return OK;
		usleep(1000);
		if (result == OK)
			result = read_page(pid, page);
	}
	if (result == OK)
		result = set_state(pid, RUNNING);
	return result == OK ? NOT_READY : result;
}

static int checkpoint(pid_t pid, const struct page *page, unsigned patience_ms)
{
	if (page->state != LOCKED)
		return ILLEGAL_STATE;
	if (page->flags & MANAGED)
		return NOT_SUPPORTED;
	int result = wait_for_beat(pid, page, patience_ms);
	if (result == OK)
		result = device_out(pid, page);
	if (result == OK)
		result = set_state(pid, CHECKPOINTED);
	return result == OK ? device_gone(page) : result;
}

static int restore(pid_t pid, struct page *page, const struct restore_args *args, const struct script *script)
{
	unsigned count = args == NULL || args->pairs == NULL ? 0 : args->count;
	const unsigned char *target = count == 0 ? page->uuid : NULL;

	if (page->state != CHECKPOINTED)
		return ILLEGAL_STATE;
	int result = wait_for_beat(pid, page, script->patience_ms);
	if (result != OK)
		return result;
	for (unsigned at = 0; at < count; at++)
		if (memcmp(args->pairs[at].from, page->uuid, sizeof page->uuid) == 0)
			target = args->pairs[at].to;
	result = target == NULL ? INVALID_DEVICE : device_in(pid, page, target, script->nodes);
	if (result == OK)
		return set_state(pid, LOCKED);
	set_state(pid, FAILED);
	return result;
}

/* The id by which the caller knows a thread that the process knows as `inner`. */
static int outer_thread(pid_t pid, uint32_t inner, int *tid)
{
	char path[PATH_MAX], line[LINE];
	struct dirent *task;

	snprintf(path, sizeof path, "/proc/%d/task", pid);
	DIR *tasks = opendir(path);
	if (tasks == NULL)
		return OPERATING_SYSTEM;
	*tid = 0;
	while (*tid == 0 && (task = readdir(tasks)) != NULL) {
		snprintf(path, sizeof path, "/proc/%d/task/%s/status", pid, task->d_name);
		FILE *status = fopen(path, "re");
		while (status != NULL && fgets(line, sizeof line, status) != NULL) {
			char *last = strrchr(line, '\t');
			if (strncmp(line, "NSpid:", 6) == 0 && last != NULL && (uint32_t)atoi(last) == inner)
				*tid = atoi(task->d_name);
		}
		if (status != NULL)
			fclose(status);
	}
	closedir(tasks);
	return *tid == 0 ? UNKNOWN : OK;
}

static int end(uint64_t began, enum call_kind kind, pid_t pid, int result)
{
	write_log(began, kind, pid, result, "");
	return result;
}

EXPORT int cuCheckpointProcessGetState(int pid, int *state)
{
	uint64_t began = now_ns();
	struct script script;
	struct page page;
	int result = begin(STATE, pid, &script, &page);

	if (result == OK)
		*state = (int)page.state;
	return end(began, STATE, pid, result);
}

EXPORT int cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
	uint64_t began = now_ns();
	struct script script;
	struct page page;
	int result = begin(THREAD, pid, &script, &page);

	if (result == OK)
		result = outer_thread(pid, page.thread, tid);
	return end(began, THREAD, pid, result);
}

EXPORT int cuCheckpointProcessLock(int pid, const struct lock_args *args)
{
	uint64_t began = now_ns();
	struct script script;
	struct page page;
	int result = begin(LOCK, pid, &script, &page);

	if (result == OK)
		result = lock(pid, &page, args == NULL ? 0 : args->timeout_ms);
	return end(began, LOCK, pid, result);
}

EXPORT int cuCheckpointProcessCheckpoint(int pid, const void *args)
{
	uint64_t began = now_ns();
	struct script script;
	struct page page;
	int result = begin(CHECKPOINT, pid, &script, &page);

	(void)args;
	if (result == OK)
		result = checkpoint(pid, &page, script.patience_ms);
	return end(began, CHECKPOINT, pid, result);
}

EXPORT int cuCheckpointProcessRestore(int pid, const struct restore_args *args)
{
	uint64_t began = now_ns();
	struct script script;
	struct page page;
	char map[2048] = "", from[64], to[64];
	int result = begin(RESTORE, pid, &script, &page);

	if (result == OK)
		result = restore(pid, &page, args, &script);
	for (unsigned at = 0, used = 0; args != NULL && at < args->count && used + 128 < sizeof map; at++) {
		uuid_text(from, args->pairs[at].from);
		uuid_text(to, args->pairs[at].to);
		used += (unsigned)sprintf(map + used, "%s%s=%s", at == 0 ? "" : ",", from, to);
	}
	write_log(began, RESTORE, pid, result, map);
	return result;
}

EXPORT int cuCheckpointProcessUnlock(int pid, const void *args)
{
	uint64_t began = now_ns();
	struct script script;
	struct page page;
	int result = begin(UNLOCK, pid, &script, &page);

	(void)args;
	if (result == OK)
		result = page.state == LOCKED ? set_state(pid, RUNNING) : ILLEGAL_STATE;
	return end(began, UNLOCK, pid, result);
}

#endif
