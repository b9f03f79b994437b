#include "native.h"

/* The driver's functions come as addresses, since nothing here is linked with it (cuda.h, CUDA 12). */
typedef int upload_call(uint64_t device, const void *host, size_t size, void *stream);
typedef int download_call(void *host, uint64_t device, size_t size, void *stream);
typedef int record_call(void *event, void *stream);
typedef int wait_call(void *event);

int rw_upload(const struct rw_lane_calls *calls, uint64_t device, const void *host, size_t size, void *stream, void *event,
	      void *next)
{
	int error = ((upload_call *)calls->upload)(device, host, size, stream);

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
