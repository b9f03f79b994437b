#include "native.h"

/* The driver's functions come as addresses, since nothing here is linked with it (cuda.h, CUDA 12). */
typedef int upload_call(uint64_t device, const void *host, size_t size, void *stream);
typedef int download_call(void *host, uint64_t device, size_t size, void *stream);
typedef int record_call(void *event, void *stream);
typedef int wait_call(void *event);

int rw_upload(const struct rw_lane_calls *calls, const uint64_t *devices, size_t count, const void *host, size_t size,
	      void *stream, void *event, void *next)
{
	int error = 0;

	for (size_t at = 0, after; at < count && error == 0; at = after) {
		after = at + 1;
		while (after < count && devices[after] == devices[after - 1] + size)
			after++;
		error = ((upload_call *)calls->upload)(devices[at], (const char *)host + at * size, (after - at) * size, stream);
	}
	if (error == 0)
		error = ((record_call *)calls->record)(event, stream);
	if (error == 0 && next != NULL)
		error = ((wait_call *)calls->wait)(next);
	return error;
}

int rw_download(const struct rw_lane_calls *calls, void *host, uint64_t device, size_t size, void *stream, void *event)
{
	int error = ((download_call *)calls->download)(host, device, size, stream);

	return error == 0 ? ((record_call *)calls->record)(event, stream) : error;
}
