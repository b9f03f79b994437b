/* A libnvidia-ml.so.1 for machines without a GPU: what nvidia-ml-py (13.x) asks for an inventory, answered out of the
 * file `node` (format: fake_gpu.py), which is read at each call, so that a test changes the machine by writing it. */
#include "fake_node.h"

#include <stdatomic.h>
#include <unistd.h>

enum {
	SUCCESS = 0,
	UNINITIALIZED = 1,
	INVALID_ARGUMENT = 2,
	NOT_SUPPORTED = 3,
	NOT_FOUND = 6,
	INSUFFICIENT_SIZE = 7,
	DRIVER_NOT_LOADED = 9,
	GPU_IS_LOST = 15,
	UNKNOWN = 999,
};

enum { MOST = 64 };

struct memory {
	unsigned long long total, free, used;
};
struct process {
	unsigned pid;
	unsigned long long bytes;
	unsigned gpu_instance, compute_instance;
};

static atomic_int users;
/* A handle is the address of a UUID that was asked for once. Filled from the start, under no lock: who asks for handles
 * is one thread. */
static char handles[MOST][64];

EXPORT const char *nvmlErrorString(int result)
{
	switch (result) {
	case SUCCESS:
		return "Success";
	case UNINITIALIZED:
		return "Uninitialized";
	case INVALID_ARGUMENT:
		return "Invalid Argument";
	case NOT_SUPPORTED:
		return "Not Supported";
	case NOT_FOUND:
		return "Not Found";
	case INSUFFICIENT_SIZE:
		return "Insufficient Size";
	case DRIVER_NOT_LOADED:
		return "Driver Not Loaded";
	case GPU_IS_LOST:
		return "GPU is lost";
	default:
		return "Unknown Error";
	}
}

EXPORT int nvmlInitWithFlags(unsigned flags)
{
	FILE *node = open_for_reading("node");

	(void)flags;
	if (node == NULL)
		return DRIVER_NOT_LOADED;
	fclose(node);
	users++;
	return SUCCESS;
}

EXPORT int nvmlInit_v2(void)
{
	return nvmlInitWithFlags(0);
}

EXPORT int nvmlShutdown(void)
{
	if (users == 0)
		return UNINITIALIZED;
	users--;
	return SUCCESS;
}

static int give_text(char *target, unsigned size, const char *text)
{
	if (strlen(text) >= size)
		return INSUFFICIENT_SIZE;
	strcpy(target, text);
	return SUCCESS;
}

EXPORT int nvmlSystemGetDriverVersion(char *version, unsigned size)
{
	char word[64];

	if (users == 0)
		return UNINITIALIZED;
	node_word("driver", word);
	return *word == 0 ? UNKNOWN : give_text(version, size, word);
}

EXPORT int nvmlDeviceGetCount_v2(unsigned *count)
{
	struct gpu gpu;
	FILE *node = open_for_reading("node");

	*count = 0;
	while (node != NULL && next_gpu(node, &gpu))
		++*count;
	if (node != NULL)
		fclose(node);
	return users == 0 ? UNINITIALIZED : SUCCESS;
}

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, const char **handle)
{
	struct gpu gpu;

	if (users == 0)
		return UNINITIALIZED;
	if (!find_gpu(uuid, &gpu))
		return NOT_FOUND;
	for (size_t at = 0; at < MOST; at++) {
		if (handles[at][0] == 0)
			strcpy(handles[at], gpu.uuid);
		if (strcmp(handles[at], uuid) == 0) {
			*handle = handles[at];
			return SUCCESS;
		}
	}
	return UNKNOWN;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, const char **handle)
{
	struct gpu gpu;
	FILE *node = open_for_reading("node");
	bool found = node != NULL;

	for (unsigned at = 0; found && at <= index; at++)
		found = next_gpu(node, &gpu);
	if (node != NULL)
		fclose(node);
	if (found && strcmp(gpu.mig, "lost") == 0)
		return GPU_IS_LOST;
	return found ? nvmlDeviceGetHandleByUUID(gpu.uuid, handle) : users == 0 ? UNINITIALIZED : INVALID_ARGUMENT;
}

static int look_up(const char *handle, struct gpu *gpu)
{
	if (users == 0)
		return UNINITIALIZED;
	if (handle == NULL)
		return INVALID_ARGUMENT;
	return find_gpu(handle, gpu) ? SUCCESS : GPU_IS_LOST;
}

EXPORT int nvmlDeviceGetUUID(const char *handle, char *uuid, unsigned size)
{
	struct gpu gpu;
	int result = look_up(handle, &gpu);

	return result == SUCCESS ? give_text(uuid, size, gpu.uuid) : result;
}

EXPORT int nvmlDeviceGetName(const char *handle, char *name, unsigned size)
{
	struct gpu gpu;
	int result = look_up(handle, &gpu);

	return result == SUCCESS ? give_text(name, size, gpu.model) : result;
}

EXPORT int nvmlDeviceGetMinorNumber(const char *handle, unsigned *number)
{
	struct gpu gpu;
	int result = look_up(handle, &gpu);

	if (result == SUCCESS)
		*number = gpu.minor;
	return result;
}

EXPORT int nvmlDeviceGetMemoryInfo(const char *handle, struct memory *memory)
{
	struct gpu gpu;
	int result = look_up(handle, &gpu);
	char delay[64];

	node_word("delay", delay);
	for (int left = atoi(delay); left > 0; left--)
		usleep(1000);
	if (result == SUCCESS)
		*memory = (struct memory){gpu.total, gpu.free, gpu.total - gpu.free};
	return result;
}

EXPORT int nvmlDeviceGetComputeMode(const char *handle, unsigned *mode)
{
	struct gpu gpu;
	int result = look_up(handle, &gpu);

	if (result == SUCCESS)
		*mode = gpu.mode;
	return result;
}

EXPORT int nvmlDeviceGetMigMode(const char *handle, unsigned *current, unsigned *pending)
{
	struct gpu gpu;
	int result = look_up(handle, &gpu);

	if (result == SUCCESS && strcmp(gpu.mig, "-") == 0)
		return NOT_SUPPORTED;
	if (result == SUCCESS)
		*current = *pending = (unsigned)atoi(gpu.mig);
	return result;
}

/* The lines `KEY UUID PID [BYTES]`. As the real one: the count that there is, and an error if that is too many. */
static int processes(const char *key, const char *handle, unsigned *count, struct process *found)
{
	char line[LINE], name[16], uuid[64];
	struct gpu gpu;
	unsigned room = found == NULL ? 0 : *count;
	int result = look_up(handle, &gpu);

	if (result != SUCCESS)
		return result;
	FILE *node = open_for_reading("node");
	*count = 0;
	while (node != NULL && fgets(line, sizeof line, node) != NULL) {
		struct process one = {.gpu_instance = ~0u, .compute_instance = ~0u};

		if (sscanf(line, "%15s %63s %u %llu", name, uuid, &one.pid, &one.bytes) < 3 || strcmp(name, key) != 0 ||
		    strcmp(uuid, gpu.uuid) != 0)
			continue;
		if (*count < room)
			found[*count] = one;
		++*count;
	}
	if (node != NULL)
		fclose(node);
	return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(const char *handle, unsigned *count, struct process *found)
{
	return processes("process", handle, count, found);
}

EXPORT int nvmlDeviceGetMPSComputeRunningProcesses_v3(const char *handle, unsigned *count, struct process *found)
{
	return processes("mps", handle, count, found);
}
