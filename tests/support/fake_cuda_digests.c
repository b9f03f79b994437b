/* The fake driver's compiler and the one kernel that it knows: BLAKE3 of windows of 2 MiB (gpu/blake3_ptx.py), from the
 * specification. Whether the kernel's own text does the same is tests/unit/test_blake3_ptx.py and tests/gpu.
 *
 * Lines of the file `node`: `compiler none`, `compiler broken` for one that links nothing, `compiler useless` for one of
 * which comes nothing that can be loaded, and `kernel idle` for one that ends and has written nothing, `kernel wrong`
 * for one whose digests are not those of the memory; `kernel idle-later` and `wrong-later` from its second launch on, `zeros-later`
 * for one that takes everything for zeros from then on. */
#include "fake_cuda.h"

void fake_finish(void *stream);

enum { WINDOW = 2 << 20, LEAF = 1024, BLOCK = 64, INVALID_PTX = 218, NO_COMPILER = 221, NOT_FOUND = 500 };
enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8 };

static const uint32_t INITIAL[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
				    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

static void mix(uint32_t *a, uint32_t *b, uint32_t *c, uint32_t *d, uint32_t first, uint32_t second)
{
	*a += *b + first;
	*d = (*d ^ *a) >> 16 | (*d ^ *a) << 16;
	*c += *d;
	*b = (*b ^ *c) >> 12 | (*b ^ *c) << 20;
	*a += *b + second;
	*d = (*d ^ *a) >> 8 | (*d ^ *a) << 24;
	*c += *d;
	*b = (*b ^ *c) >> 7 | (*b ^ *c) << 25;
}

static void compress(uint32_t value[static 8], const uint32_t block[static 16], uint32_t counter, uint32_t flags)
{
	static const uint8_t permutation[16] = {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8};
	uint32_t m[16], v[16];

	memcpy(m, block, sizeof m);
	memcpy(v, value, 8 * sizeof *v);
	memcpy(v + 8, INITIAL, 4 * sizeof *v);
	v[12] = counter;
	v[13] = 0;
	v[14] = BLOCK;
	v[15] = flags;
	for (int round = 0; round < 7; round++) {
		uint32_t next[16];

		for (int at = 0; at < 4; at++)
			mix(&v[at], &v[at + 4], &v[at + 8], &v[at + 12], m[2 * at], m[2 * at + 1]);
		for (int at = 0; at < 4; at++)
			mix(&v[at], &v[(at + 1) % 4 + 4], &v[(at + 2) % 4 + 8], &v[(at + 3) % 4 + 12], m[2 * at + 8],
			    m[2 * at + 9]);
		for (int at = 0; at < 16; at++)
			next[at] = m[permutation[at]];
		memcpy(m, next, sizeof m);
	}
	for (int at = 0; at < 8; at++)
		value[at] = v[at] ^ v[at + 8];
}

static void digest(uint32_t found[static 8], const uint8_t *data)
{
	static _Thread_local uint32_t values[WINDOW / LEAF][8];

	for (uint32_t leaf = 0; leaf < WINDOW / LEAF; leaf++) {
		memcpy(values[leaf], INITIAL, sizeof INITIAL);
		for (uint32_t at = 0; at < LEAF / BLOCK; at++) {
			uint32_t flags = at == 0 ? CHUNK_START : at == LEAF / BLOCK - 1 ? CHUNK_END : 0;
			uint32_t block[16];

			memcpy(block, data + (size_t)leaf * LEAF + (size_t)at * BLOCK, BLOCK);
			compress(values[leaf], block, leaf, flags);
		}
	}
	for (uint32_t count = WINDOW / LEAF / 2; count > 0; count /= 2)
		for (uint32_t at = 0; at < count; at++) {
			uint32_t value[8];

			memcpy(value, INITIAL, sizeof value);
			compress(value, values[2 * at], 0, count == 1 ? PARENT | ROOT : PARENT);
			memcpy(values[at], value, sizeof value);
		}
	memcpy(found, values[0], sizeof values[0]);
}

static unsigned launches;
static _Thread_local char linked[1 << 20];

static bool node_says(const char *key, const char *what)
{
	char word[64];

	node_word(key, word);
	return strcmp(word, what) == 0;
}

EXPORT int cuMemHostGetDevicePointer_v2(uint64_t *device, void *host, unsigned flags)
{
	*device = (uintptr_t)host;
	return flags == 0 ? OK : INVALID_VALUE;
}

/* What is linked is its text behind this. */
static const char COMPILED[] = "\177compiled ";

EXPORT int cuLinkCreate_v2(unsigned count, const int *options, void **values, char **state)
{
	*state = calloc(1, 1);
	return count == 0 && options == NULL && values == NULL ? OK : INVALID_VALUE;
}

EXPORT int cuLinkAddData_v2(char *state, int type, const char *data, size_t size, const char *name, unsigned count,
			    const int *options, void **values)
{
	if (type != 1 || size == 0 || data[size - 1] != 0 || name == NULL || count != 0 || options != NULL || values != NULL)
		return INVALID_VALUE;
	if (node_says("compiler", "none"))
		return NO_COMPILER;
	if (node_says("compiler", "broken"))
		return INVALID_PTX;
	if (strstr(data, ".visible .entry") == NULL)
		return INVALID_PTX;
	snprintf(linked, sizeof linked, "%s%s", COMPILED, data);
	return state == NULL ? INVALID_VALUE : OK;
}

EXPORT int cuLinkComplete(char *state, void **code, size_t *size)
{
	*code = linked;
	*size = node_says("compiler", "useless") ? 5 : strlen(linked) + 1;
	return state == NULL ? INVALID_VALUE : OK;
}

EXPORT int cuLinkDestroy(char *state)
{
	free(state);
	memset(linked, 0, sizeof linked);
	return OK;
}

EXPORT int cuModuleLoadData(void **module, const char *text)
{
	static char loaded;

	*module = &loaded;
	if (strncmp(text, COMPILED, strlen(COMPILED)) != 0 && node_says("compiler", "none"))
		return NO_COMPILER;
	return strstr(text, ".visible .entry digests(.param .u64 addresses, .param .u64 found)") ? OK : INVALID_PTX;
}

EXPORT int cuModuleGetFunction(void **function, void *module, const char *name)
{
	*function = module;
	return module != NULL && strcmp(name, "digests") == 0 ? OK : NOT_FOUND;
}

EXPORT int cuLaunchKernel(void *function, unsigned blocks, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
			  unsigned threads_z, unsigned shared, void *stream, void **parameters, void **extra)
{
	const uint64_t *addresses = *(const uint64_t **)parameters[0];
	uint32_t(*found)[8] = *(uint32_t(**)[8])parameters[1];

	if (function == NULL || stream == NULL || extra != NULL || shared != 0)
		return INVALID_VALUE;
	if (y * z * threads_y * threads_z != 1 || threads != 1024 || blocks == 0)
		return INVALID_VALUE;
	fake_finish(stream);
	bool later = __atomic_fetch_add(&launches, 1, __ATOMIC_RELAXED) >= 1;
	if (node_says("kernel", "idle") || (later && node_says("kernel", "idle-later")))
		return OK;
	bool wrong = node_says("kernel", "wrong") || (later && node_says("kernel", "wrong-later"));
	for (unsigned at = 0; at < blocks; at++) {
		static const uint8_t zeros[WINDOW];
		bool blind = later && node_says("kernel", "zeros-later");

		digest(found[at], blind ? zeros : (const uint8_t *)addresses[at]);
		found[at][7] ^= wrong;
	}
	return OK;
}
