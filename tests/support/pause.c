/* The first process of a pod's sandbox: it keeps the pod's namespaces, and reaps what a shared pid namespace leaves. */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void on_signal(int number)
{
	if (number != SIGCHLD)
		_exit(0);
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
}

int main(void)
{
	struct sigaction action = {.sa_handler = on_signal};

	if (sigaction(SIGINT, &action, NULL) || sigaction(SIGTERM, &action, NULL) || sigaction(SIGCHLD, &action, NULL))
		return 1;
	for (;;)
		pause();
}
