/* What rewarm calls in a process of its own to fill and read device memory, over that of device_memory/fake_libcuda.c; and
 * what ties that to the rest of the fake: the UUIDs of the node's GPUs, and that a locked process's calls wait. */
#include "fake_cuda.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

int fake_uuid(uint8_t *uuid, int device);
void fake_enter(void);
void fake_finish(void *stream);
int fake_copy(void *stream, void *to, const void *from, size_t size);

/* In CUDA_VISIBLE_DEVICES, if that is set, else all of the node's. */
static bool is_visible(const char *uuid)
{
	const char *visible = getenv("CUDA_VISIBLE_DEVICES");

	return visible == NULL || strstr(visible, uuid) != NULL;
}

static bool parse(const char *text, uint8_t *uuid)
{
	int at = 0;

	for (text += strlen("GPU-"); at < 32 && *text != '\0'; text++) {
		const char *digits = "0123456789abcdef", *digit = strchr(digits, *text);

		if (*text == '-')
			continue;
		if (digit == NULL)
			return false;
		uuid[at / 2] = (uint8_t)(uuid[at / 2] << 4 | (digit - digits));
		at++;
	}
	return at == 32;
}

/* The UUID of the GPU number `wanted`; how many there are. */
static int look(int wanted, uint8_t *uuid)
{
	FILE *node = open_for_reading("node");
	struct gpu gpu;
	int count = 0;

	while (node != NULL && next_gpu(node, &gpu))
		if (is_visible(gpu.uuid)) {
			if (count == wanted)
				parse(gpu.uuid, uuid);
			count++;
		}
	if (node != NULL)
		fclose(node);
	return count;
}

int fake_uuid(uint8_t *uuid, int device)
{
	return device >= 0 && device < look(device, uuid) ? OK : INVALID_DEVICE;
}

void fake_enter(void)
{
	const struct timespec pause = { .tv_nsec = 2000000 };
	struct page page;

	while (read_page(getpid(), &page) == OK && page.state != RUNNING)
		nanosleep(&pause, NULL);
}

EXPORT int cuDeviceGetCount(int *count)
{
	uint8_t uuid[16];

	*count = look(-1, uuid);
	return OK;
}

EXPORT int cuDeviceGet(int *device, int ordinal)
{
	*device = ordinal;
	return OK;
}

EXPORT int cuMemHostRegister_v2(void *memory, size_t size, unsigned flags)
{
	return memory != NULL && size > 0 && flags == 0 ? OK : INVALID_VALUE;
}

/* Copies happen as late as a real GPU's may: when somebody waits for them, or when something follows them in their stream.
 * Who looks too early sees what was there before, and who uses a buffer too early sends what is in it then. */
struct copy {
	struct copy *next;
	void *to;
	const void *from; /* NULL: bytes of `value` */
	size_t size;
	unsigned char value;
};

struct queue {
	struct queue *next;
	void *stream;
	struct copy *first, **last;
	uint64_t begun, done;
};

struct event {
	void *stream;
	uint64_t after;
};

static pthread_mutex_t queues_lock = PTHREAD_MUTEX_INITIALIZER;
static struct queue *queues;

static struct queue *queue_of(void *stream)
{
	struct queue *found = queues;

	while (found != NULL && found->stream != stream)
		found = found->next;
	if (found == NULL) {
		found = calloc(1, sizeof *found);
		*found = (struct queue){.next = queues, .stream = stream, .last = &found->first};
		queues = found;
	}
	return found;
}

static int begin(void *stream, struct copy wanted)
{
	if (stream == NULL)
		return INVALID_VALUE;
	pthread_mutex_lock(&queues_lock);
	struct queue *queue = queue_of(stream);
	struct copy *copy = malloc(sizeof *copy);
	*copy = wanted;
	*queue->last = copy;
	queue->last = &copy->next;
	queue->begun++;
	pthread_mutex_unlock(&queues_lock);
	return OK;
}

int fake_copy(void *stream, void *to, const void *from, size_t size)
{
	return begin(stream, (struct copy){.to = to, .from = from, .size = size});
}

static void finish_copies(void *stream, uint64_t until)
{
	pthread_mutex_lock(&queues_lock);
	struct queue *queue = queue_of(stream);
	while (queue->first != NULL && queue->done < until) {
		struct copy *copy = queue->first;

		if (copy->from != NULL)
			memcpy(copy->to, copy->from, copy->size);
		else
			memset(copy->to, copy->value, copy->size);
		queue->first = copy->next;
		if (queue->first == NULL)
			queue->last = &queue->first;
		queue->done++;
		free(copy);
	}
	pthread_mutex_unlock(&queues_lock);
}

void fake_finish(void *stream)
{
	finish_copies(stream, UINT64_MAX);
}

EXPORT int cuEventCreate(void **event, unsigned flags)
{
	*event = calloc(1, sizeof(struct event));
	return flags == 2 && *event != NULL ? OK : INVALID_VALUE;
}

EXPORT int cuEventRecord(struct event *event, void *stream)
{
	if (event == NULL || stream == NULL)
		return INVALID_VALUE;
	pthread_mutex_lock(&queues_lock);
	*event = (struct event){stream, queue_of(stream)->begun};
	pthread_mutex_unlock(&queues_lock);
	return OK;
}

/* Of one that was never recorded there is nothing to wait for. */
EXPORT int cuEventSynchronize(struct event *event)
{
	if (event == NULL)
		return INVALID_VALUE;
	if (event->stream != NULL)
		finish_copies(event->stream, event->after);
	return OK;
}

EXPORT int cuMemcpyHtoDAsync_v2(uint64_t device, const void *host, size_t size, void *stream)
{
	return fake_copy(stream, (void *)device, host, size);
}

EXPORT int cuMemcpyDtoHAsync_v2(void *host, uint64_t device, size_t size, void *stream)
{
	return fake_copy(stream, host, (const void *)device, size);
}

EXPORT int cuMemsetD8Async(uint64_t device, unsigned char value, size_t size, void *stream)
{
	return begin(stream, (struct copy){.to = (void *)device, .size = size, .value = value});
}
