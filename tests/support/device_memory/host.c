/* Loads plugin.so, and calls it without CUDA in its own list of libraries. Prints the names of its threads. */
#include "tasks.h"

#include <dlfcn.h>

int main(int count, char **arguments)
{
	void *plugin = count < 2 ? NULL : dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL), *pointer;
	int (*allocate)(void **, size_t) = plugin == NULL ? NULL : dlsym(plugin, "plugin_allocate");
	int (*release)(void *) = plugin == NULL ? NULL : dlsym(plugin, "plugin_free");

	if (allocate == NULL || release == NULL || allocate(&pointer, 4 << 20) != 0)
		return 1;
	print_tasks();
	return release(pointer);
}
