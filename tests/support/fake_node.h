/* What the two fake NVIDIA libraries share: the directory that stands for the machine, and its file `node`. */
#ifndef FAKE_NODE_H
#define FAKE_NODE_H

#include <dlfcn.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum { LINE = 512 };

struct gpu {
	char uuid[64];
	unsigned minor;
	unsigned long long total, free;
	unsigned mode;
	char mig[8]; /* "0", "1", "-": the GPU knows no such mode, or "lost": it has fallen off the bus */
	char model[96];
};

/* The path of `name` in $FAKE_CUDA_DIR; without that in the directory of the library, since a runtime is started with
 * almost no environment. */
static inline void path_of(char path[static PATH_MAX], const char *name)
{
	static const char here = 0;
	const char *set = getenv("FAKE_CUDA_DIR");
	Dl_info info;

	if (set != NULL && *set != 0) {
		snprintf(path, PATH_MAX, "%s/%s", set, name);
		return;
	}
	const char *file = dladdr(&here, &info) != 0 ? info.dli_fname : "./";
	const char *slash = strrchr(file, '/');
	int length = slash == NULL ? 0 : (int)(slash - file) + 1;
	snprintf(path, PATH_MAX, "%.*s%s", length, file, name);
}

static inline FILE *open_for_reading(const char *name)
{
	char path[PATH_MAX];

	path_of(path, name);
	return fopen(path, "re");
}

/* The next line that describes a GPU. */
static inline bool next_gpu(FILE *node, struct gpu *gpu)
{
	char line[LINE];

	while (fgets(line, sizeof line, node) != NULL) {
		memset(gpu, 0, sizeof *gpu);
		if (sscanf(line, "gpu %63s %u %llu %llu %u %7s %95[^\n]", gpu->uuid, &gpu->minor, &gpu->total, &gpu->free,
			   &gpu->mode, gpu->mig, gpu->model) == 7)
			return true;
	}
	return false;
}

static inline bool find_gpu(const char *uuid, struct gpu *gpu)
{
	FILE *node = open_for_reading("node");
	bool found = false;

	while (node != NULL && !found && next_gpu(node, gpu))
		found = strcmp(gpu->uuid, uuid) == 0;
	if (node != NULL)
		fclose(node);
	return found;
}

/* The word behind `key`; "" if the file has no such line. */
static inline void node_word(const char *key, char word[static 64])
{
	FILE *node = open_for_reading("node");
	char line[LINE], name[64];

	*word = 0;
	while (node != NULL && fgets(line, sizeof line, node) != NULL)
		if (sscanf(line, "%63s %63s", name, word) != 2 || strcmp(name, key) != 0)
			*word = 0;
		else
			break;
	if (node != NULL)
		fclose(node);
}

#endif
