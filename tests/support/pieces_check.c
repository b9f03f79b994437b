/* native/rewarm_native/pieces.c, for a build with sanitizers: arrays of the exact size on the heap, and a driver that fails
 * at each call in turn. Prints "ok". */
#include "native.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>

enum { MOST = 9, FIRST = 100, TYPE = 1, FAILURE = 700 };

static size_t calls, fails_at;
static uint64_t expected;
static const char properties[] = "properties";

static int create(uint64_t *handle, size_t size, const void *given, unsigned long long flags)
{
	assert(given == properties && flags == 0 && size == (calls + 1) << 21);
	if (calls == fails_at)
		return FAILURE;
	*handle = FIRST + calls++;
	return 0;
}

static int map(uint64_t address, size_t size, size_t offset, uint64_t handle, unsigned long long flags)
{
	assert(address == expected && offset == 0 && handle == FIRST + calls && flags == 0);
	if (calls == fails_at)
		return FAILURE;
	calls++;
	expected += size;
	return 0;
}

static int export(void *shareable, uint64_t handle, int type, unsigned long long flags)
{
	assert(type == TYPE && handle == FIRST + calls && flags == 0);
	if (calls == fails_at)
		return FAILURE;
	*(int *)shareable = (int)(3 + calls++);
	return 0;
}

/* `count` pieces, of which number `fails` fails; none of them if that is `count`. */
static void check(size_t count, size_t fails)
{
	uint64_t *sizes = malloc(count * sizeof(*sizes));
	uint64_t *handles = calloc(count, sizeof(*handles));
	int *fds = calloc(count, sizeof(*fds));
	const int result = fails < count ? FAILURE : 0;
	size_t done = MOST;

	assert(sizes != NULL && handles != NULL && fds != NULL);
	for (size_t at = 0; at < count; at++)
		sizes[at] = (at + 1) << 21;
	fails_at = fails;
	calls = 0;
	assert(rw_create_pieces((void *)create, properties, sizes, count, handles, &done) == result && done == fails);
	for (size_t at = 0; at < count; at++) {
		assert(handles[at] == (at < fails ? FIRST + at : 0));
		handles[at] = FIRST + at;
	}
	calls = 0;
	expected = 1UL << 40;
	assert(rw_map_pieces((void *)map, expected, sizes, handles, count, &done) == result && done == fails);
	calls = 0;
	assert(rw_export_pieces((void *)export, handles, count, TYPE, fds, &done) == result && done == fails);
	for (size_t at = 0; at < count; at++)
		assert(fds[at] == (at < fails ? (int)(3 + at) : 0));
	free(fds);
	free(handles);
	free(sizes);
}

int main(void)
{
	for (size_t count = 1; count <= MOST; count++)
		for (size_t fails = 0; fails <= count; fails++)
			check(count, fails);
	check(0, 0);
	puts("ok");
	return 0;
}
