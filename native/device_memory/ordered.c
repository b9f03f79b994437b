#include "ordered.h"
#include "change.h"
#include "device.h"
#include "lock.h"
#include "serve.h"
#include "table.h"

/* So many frees are a program's way of working. */
enum { MOST_FREES = 32 };

/* Freed by the program, and perhaps still in use by a stream. Their entries are in the table, so that a capture takes
 * their memory with the rest. */
static struct {
	struct rw_lock lock;
	struct rw_allocation *first;
} waiting;
static uint32_t frees;

/* Events may be looked at while another thread captures. */
struct mode {
	const struct rw_driver *driver;
	int before;
};

static void restore(struct mode *mode)
{
	mode->driver->cuThreadExchangeStreamCaptureMode(&mode->before);
}

#define RELAXED                                                                                              \
	__attribute__((cleanup(restore))) struct mode mode = { driver, CU_STREAM_CAPTURE_MODE_RELAXED };     \
	driver->cuThreadExchangeStreamCaptureMode(&mode.before)

static void push(struct rw_allocation *one)
{
	rw_lock_within(&waiting.lock, -1);
	one->next = waiting.first;
	__atomic_store_n(&waiting.first, one, __ATOMIC_RELAXED); /* also read without the lock */
	rw_unlock(&waiting.lock);
}

static struct rw_allocation *pop_all(void)
{
	if (__atomic_load_n(&waiting.first, __ATOMIC_RELAXED) == NULL)
		return NULL;
	rw_lock_within(&waiting.lock, -1);
	struct rw_allocation *all = waiting.first;
	__atomic_store_n(&waiting.first, NULL, __ATOMIC_RELAXED);
	rw_unlock(&waiting.lock);
	return all;
}

static const struct rw_driver *find_driver(void)
{
	const struct rw_driver *driver = rw_find_driver();

	return driver != NULL && driver->cuStreamIsCapturing != NULL && driver->cuStreamGetCtx != NULL &&
			       driver->cuDeviceGetMemPool != NULL && driver->cuDeviceGetDefaultMemPool != NULL &&
			       driver->cuEventCreate != NULL && driver->cuEventRecord != NULL &&
			       driver->cuEventQuery != NULL && driver->cuEventSynchronize != NULL &&
			       driver->cuEventDestroy_v2 != NULL ?
		       driver :
		       NULL;
}

/* What a capture records is no allocation, but a node of a graph. */
static bool is_plain(const struct rw_driver *driver, void *stream)
{
	int capturing = 0;

	return driver->cuStreamIsCapturing(stream, &capturing) == CUDA_SUCCESS && capturing == 0;
}

/* The memory is that of the stream's device and of its current pool. */
static bool is_default(const struct rw_driver *driver, void *stream)
{
	void *current = NULL, *context = NULL, *pool = NULL, *first = NULL;
	int device;

	return driver->cuCtxGetCurrent(&current) == CUDA_SUCCESS && driver->cuCtxGetDevice(&device) == CUDA_SUCCESS &&
	       driver->cuStreamGetCtx(stream, &context) == CUDA_SUCCESS && context == current &&
	       driver->cuDeviceGetMemPool(&pool, device) == CUDA_SUCCESS &&
	       driver->cuDeviceGetDefaultMemPool(&first, device) == CUDA_SUCCESS && pool == first;
}

bool rw_serving_ordered(void)
{
	return rw_serving() && __atomic_load_n(&frees, __ATOMIC_RELAXED) < MOST_FREES;
}

bool rw_serve_ordered(uint64_t *address, size_t size, void *stream)
{
	const struct rw_driver *driver = find_driver();

	return driver != NULL && is_plain(driver, stream) && is_default(driver, stream) &&
	       rw_serve(address, size, RW_ORDERED);
}

static int note_event(const struct rw_driver *driver, struct rw_allocation *one, void *stream)
{
	void *event;
	int result = driver->cuEventCreate(&event, CU_EVENT_DISABLE_TIMING);

	if (result != CUDA_SUCCESS)
		return result;
	result = driver->cuEventRecord(event, stream);
	if (result == CUDA_SUCCESS)
		one->event = event;
	else
		driver->cuEventDestroy_v2(event);
	return result;
}

int rw_free_ordered(uint64_t address, void *stream)
{
	const struct rw_driver *driver = rw_driver() == NULL ? NULL : find_driver();

	if (driver == NULL || address == 0)
		return RW_NOT_OURS;
	struct rw_allocation *one = rw_begin_free(address);
	if (one == NULL)
		return RW_NOT_OURS;
	bool ordered = one->tag == 0;
	if (!ordered || !is_plain(driver, stream)) {
		rw_end_free(one);
		return ordered ? RW_TO_DRIVER : RW_NOT_OURS;
	}
	RELAXED;
	int result = note_event(driver, one, stream);
	if (result != CUDA_SUCCESS) {
		rw_end_free(one);
		return result;
	}
	__atomic_add_fetch(&frees, 1, __ATOMIC_RELAXED);
	push(one);
	return CUDA_SUCCESS;
}

/* Of those that `is_done` says. */
static bool end_all(const struct rw_driver *driver, int (*is_done)(void *event))
{
	struct rw_allocation *all = pop_all();
	bool ended = false;

	if (all == NULL)
		return false;
	RELAXED;
	for (struct rw_allocation *next; all != NULL; all = next) {
		next = all->next;
		if (is_done(all->event) != CUDA_SUCCESS) {
			push(all);
			continue;
		}
		RW_CHANGE;
		driver->cuEventDestroy_v2(all->event);
		rw_take_apart(driver, all);
		ended = true;
	}
	return ended;
}

void rw_sweep_ordered(void)
{
	const struct rw_driver *driver = rw_driver();

	if (driver != NULL)
		end_all(driver, driver->cuEventQuery);
}

bool rw_wait_ordered(void)
{
	const struct rw_driver *driver = rw_driver();

	return driver != NULL && end_all(driver, driver->cuEventSynchronize);
}

void rw_end_ordered(uint32_t device)
{
	const struct rw_driver *driver = rw_driver();
	struct rw_allocation *all = driver == NULL ? NULL : pop_all();

	for (struct rw_allocation *next; all != NULL; all = next) {
		next = all->next;
		if (all->device != device) {
			push(all);
			continue;
		}
		driver->cuEventDestroy_v2(all->event);
		rw_end_free(all);
	}
}

void rw_forget_ordered(void)
{
	waiting.lock = (struct rw_lock){ 0 };
	waiting.first = NULL;
}
