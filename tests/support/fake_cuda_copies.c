/* What rewarm calls in a process of its own to fill and read device memory, over that of device_memory/fake_libcuda.c; and
 * what ties that to the rest of the fake: the UUIDs of the node's GPUs, and that a locked process's calls wait. */
#include "fake_cuda.h"

#include <time.h>
#include <unistd.h>

int fake_uuid(uint8_t *uuid, int device);
void fake_enter(void);

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

EXPORT int cuEventCreate(void **event, unsigned flags)
{
	*event = malloc(1);
	return flags == 2 && *event != NULL ? OK : INVALID_VALUE;
}

EXPORT int cuEventRecord(void *event, void *stream)
{
	return event != NULL && stream != NULL ? OK : INVALID_VALUE;
}

EXPORT int cuEventSynchronize(void *event)
{
	return event != NULL ? OK : INVALID_VALUE;
}

EXPORT int cuMemcpyHtoDAsync_v2(uint64_t device, const void *host, size_t size, void *stream)
{
	memcpy((void *)device, host, size);
	return stream != NULL ? OK : INVALID_VALUE;
}

EXPORT int cuMemcpyDtoHAsync_v2(void *host, uint64_t device, size_t size, void *stream)
{
	memcpy(host, (const void *)device, size);
	return stream != NULL ? OK : INVALID_VALUE;
}

EXPORT int cuMemsetD8Async(uint64_t device, unsigned char value, size_t size, void *stream)
{
	memset((void *)device, value, size);
	return stream != NULL ? OK : INVALID_VALUE;
}
