#include "native.h"

#include <errno.h>
#include <sys/uio.h>

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

int rw_upload_file(const struct rw_lane_calls *calls, int fd, const struct rw_run *runs, size_t count,
		   const uint64_t *devices, size_t size, void *stream, struct rw_ring *ring, size_t *done, int *refused)
{
	*refused = 0;
	for (*done = 0; *done < count; (*done)++) {
		const struct rw_run *run = &runs[*done];
		const struct iovec room = { ring->buffers[ring->next], run->windows * size };
		const size_t following = (ring->next + 1) % ring->slots;

		/* Less than all, or an error: what is wrong is said by who reads it in the usual way. */
		ssize_t got = preadv2(fd, &room, 1, (off_t)run->offset, RWF_NOWAIT);
		*refused = got < 0 && (errno == EOPNOTSUPP || errno == EINVAL);
		if (got != (ssize_t)room.iov_len)
			return 0;
		int error = rw_upload(calls, devices, run->windows, room.iov_base, size, stream, ring->events[ring->next],
				      ring->events[following]);
		if (error != 0)
			return error;
		devices += run->windows;
		ring->next = following;
	}
	return 0;
}
