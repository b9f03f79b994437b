/* Process attributes that os and signal do not offer, libraries, and what other namespaces have. */
#include "native.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

int rw_set_child_subreaper(int on)
{
	return prctl(PR_SET_CHILD_SUBREAPER, on ? 1L : 0L, 0L, 0L, 0L) < 0 ? -errno : 0;
}

int rw_set_pdeathsig(int signal)
{
	return prctl(PR_SET_PDEATHSIG, (long)signal, 0L, 0L, 0L) < 0 ? -errno : 0;
}

int rw_get_fd(int pidfd, int fd)
{
	const long result = syscall(SYS_pidfd_getfd, pidfd, fd, 0U);

	return result < 0 ? -errno : (int)result;
}

int rw_load_library(const char *path, char *error, size_t size)
{
	if (dlopen(path, RTLD_NOW | RTLD_LOCAL) != NULL)
		return 0;
	snprintf(error, size, "%s", dlerror());
	return -1;
}

struct socket_request {
	int namespace_fd;
	int family;
	int type;
	int protocol;
	int result;
};

static void *open_socket(void *argument)
{
	struct socket_request *request = argument;

	request->result = setns(request->namespace_fd, CLONE_NEWNET) < 0
				  ? -1
				  : socket(request->family, request->type | SOCK_CLOEXEC, request->protocol);
	if (request->result < 0)
		request->result = -errno;
	return NULL;
}

/* A socket belongs to the namespace of the thread that made it. The thread is one of our own that ends right
 * after, so there is no way back to fail, and none of the caller's threads is ever elsewhere. */
int rw_socket_in_netns(int namespace_fd, int family, int type, int protocol)
{
	struct socket_request request = { namespace_fd, family, type, protocol, -1 };
	pthread_t thread;
	int error = pthread_create(&thread, NULL, open_socket, &request);

	if (error == 0)
		error = pthread_join(thread, NULL);
	return error != 0 ? -error : request.result;
}

struct names_request {
	int namespace_fd;
	struct utsname names;
	int result;
};

static void *read_names(void *argument)
{
	struct names_request *request = argument;

	request->result = setns(request->namespace_fd, CLONE_NEWUTS) < 0 || uname(&request->names) < 0 ? -errno : 0;
	return NULL;
}

/* By a thread of our own, too. */
int rw_names_in_utsns(int namespace_fd, char *nodename, char *domainname, size_t size)
{
	struct names_request request = { .namespace_fd = namespace_fd, .result = -1 };
	pthread_t thread;
	int error = pthread_create(&thread, NULL, read_names, &request);

	if (error == 0)
		error = pthread_join(thread, NULL);
	if (error != 0 || request.result < 0)
		return error != 0 ? -error : request.result;
	snprintf(nodename, size, "%s", request.names.nodename);
	snprintf(domainname, size, "%s", request.names.domainname);
	return 0;
}

struct last_pid_request {
	int namespace_fd;
	const char *text;
	size_t length;
	int result;
};

/* By a child: the file is that of the namespace of the process that writes it, not of its /proc. */
static int write_last_pid(const struct last_pid_request *request)
{
	const int fd = open("/proc/sys/kernel/ns_last_pid", O_WRONLY | O_CLOEXEC);
	const ssize_t written = fd < 0 ? -1 : write(fd, request->text, request->length);

	return written == (ssize_t)request->length ? 0 : errno;
}

static void *set_last_pid(void *argument)
{
	struct last_pid_request *request = argument;
	int status = 0;
	pid_t child;

	/* vfork(2) calls none of the handlers that other libraries have for a fork(3), which expect the caller's thread. */
	if (setns(request->namespace_fd, CLONE_NEWPID) < 0 || (child = vfork()) < 0) {
		request->result = -errno;
		return NULL;
	}
	if (child == 0)
		_exit(write_last_pid(request));
	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		continue;
	request->result = WIFEXITED(status) ? -WEXITSTATUS(status) : -ECHILD;
	return NULL;
}

/* By a thread of our own: only what is forked by it is born in the other namespace. */
int rw_set_last_pid(int namespace_fd, int pid)
{
	char text[16];
	struct last_pid_request request = { namespace_fd, text, 0, -1 };
	pthread_t thread;
	int error;

	request.length = (size_t)snprintf(text, sizeof(text), "%d", pid);
	error = pthread_create(&thread, NULL, set_last_pid, &request);
	if (error == 0)
		error = pthread_join(thread, NULL);
	return error != 0 ? -error : request.result;
}

int rw_mount_tmpfs(const char *path, const char *options)
{
	return mount("rewarm", path, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options) < 0 ? -errno : 0;
}
