/* Prints the names of this process's threads, a line each. */
#include <dirent.h>
#include <stdio.h>

static void print_tasks(void)
{
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
}
