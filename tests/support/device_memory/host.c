/* Loads plugin.so, and calls it without CUDA in its own list of libraries. Prints the names of its threads. */
#include <dirent.h>
#include <dlfcn.h>
#include <stdio.h>

int main(int count, char **arguments)
{
	void *plugin = count < 2 ? NULL : dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL), *pointer;
	int (*allocate)(void **, size_t) = plugin == NULL ? NULL : dlsym(plugin, "plugin_allocate");
	int (*release)(void *) = plugin == NULL ? NULL : dlsym(plugin, "plugin_free");

	if (allocate == NULL || release == NULL || allocate(&pointer, 4 << 20) != 0)
		return 1;
	DIR *tasks = opendir("/proc/self/task");
	for (struct dirent *task; (task = readdir(tasks)) != NULL;) {
		char path[300], name[32] = "";
		snprintf(path, sizeof(path), "/proc/self/task/%s/comm", task->d_name);
		FILE *file = fopen(path, "r");
		if (file != NULL && fgets(name, sizeof(name), file) != NULL)
			fputs(name, stdout);
		if (file != NULL)
			fclose(file);
	}
	closedir(tasks);
	return release(pointer);
}
