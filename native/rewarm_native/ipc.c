/* What another IPC namespace has, and how one is that nobody has changed. By a thread of our own that enters it and ends
 * right after, as in process.c: none of the caller's is ever elsewhere. */
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <unistd.h>

struct ipc_request {
	int namespace_fd; /* -1 for a new one */
	int64_t (*work)(const struct ipc_request *request);
	const char *path;
	char *buffer;
	int32_t *pids;
	size_t size;
	int kind;
	int id;
	int key;
	int64_t result;
};

static void *in_ipcns(void *argument)
{
	struct ipc_request *request = argument;
	const int entered = request->namespace_fd < 0 ? unshare(CLONE_NEWIPC)
						      : setns(request->namespace_fd, CLONE_NEWIPC);

	request->result = entered < 0 ? -errno : request->work(request);
	return NULL;
}

static int64_t run_in_ipcns(struct ipc_request *request)
{
	pthread_t thread;
	int error = pthread_create(&thread, NULL, in_ipcns, request);

	if (error == 0)
		error = pthread_join(thread, NULL);
	return error != 0 ? -error : request->result;
}

static int64_t open_own(const struct ipc_request *request)
{
	const int fd = open("/proc/thread-self/ns/ipc", O_RDONLY | O_CLOEXEC);

	(void)request;
	return fd < 0 ? -errno : fd;
}

int rw_new_ipcns(void)
{
	struct ipc_request request = { .namespace_fd = -1, .work = open_own };

	return (int)run_in_ipcns(&request);
}

/* Older kernels look at the namespace of who reads, newer ones at that of who opens. */
static int64_t read_file(const struct ipc_request *request)
{
	const int fd = open(request->path, O_RDONLY | O_CLOEXEC);
	size_t length = 0;
	ssize_t got = 1;

	if (fd < 0)
		return -errno;
	while (got > 0 && length < request->size) {
		got = read(fd, request->buffer + length, request->size - length);
		if (got < 0 && errno == EINTR)
			got = 1;
		else if (got > 0)
			length += (size_t)got;
	}
	const int error = errno;

	close(fd);
	if (got < 0)
		return -error;
	return length == request->size ? -E2BIG : (int64_t)length;
}

int64_t rw_read_in_ipcns(int namespace_fd, const char *path, char *buffer, size_t size)
{
	struct ipc_request request = {
		.namespace_fd = namespace_fd, .work = read_file, .path = path, .buffer = buffer, .size = size
	};

	return run_in_ipcns(&request);
}

union semun {
	int val;
	struct semid_ds *buf;
};

static int64_t read_pids(const struct ipc_request *request)
{
	struct semid_ds status;
	const union semun argument = { .buf = &status };

	if (semctl(request->id, 0, IPC_STAT, argument) < 0)
		return -errno;
	for (size_t at = 0; at < status.sem_nsems && at < request->size; at++) {
		request->pids[at] = semctl(request->id, (int)at, GETPID);
		if (request->pids[at] < 0)
			return -errno;
	}
	return (int64_t)status.sem_nsems;
}

int64_t rw_sem_pids_in_ipcns(int namespace_fd, int id, int32_t *pids, size_t size)
{
	struct ipc_request request = {
		.namespace_fd = namespace_fd, .work = read_pids, .id = id, .pids = pids, .size = size
	};

	return run_in_ipcns(&request);
}

static int64_t remove_object(const struct ipc_request *request)
{
	union {
		struct shmid_ds shm;
		struct msqid_ds msg;
		struct semid_ds sem;
	} status;
	const union semun sem = { .buf = &status.sem };
	int result = -1, key = 0;

	switch (request->kind) {
	case RW_SHM:
		result = shmctl(request->id, IPC_STAT, &status.shm);
		key = status.shm.shm_perm.__key;
		break;
	case RW_MSG:
		result = msgctl(request->id, IPC_STAT, &status.msg);
		key = status.msg.msg_perm.__key;
		break;
	case RW_SEM:
		result = semctl(request->id, 0, IPC_STAT, sem);
		key = status.sem.sem_perm.__key;
		break;
	default:
		errno = EINVAL;
	}
	if (result < 0)
		return -errno;
	if (key != request->key)
		return -EIDRM; /* it is another one by now */
	if (request->kind == RW_SHM && status.shm.shm_nattch != 0)
		return -EBUSY;
	result = request->kind == RW_SHM   ? shmctl(request->id, IPC_RMID, NULL)
		 : request->kind == RW_MSG ? msgctl(request->id, IPC_RMID, NULL)
					   : semctl(request->id, 0, IPC_RMID);
	return result < 0 ? -errno : 0;
}

int rw_remove_in_ipcns(int namespace_fd, int kind, int id, int key)
{
	struct ipc_request request = {
		.namespace_fd = namespace_fd, .work = remove_object, .kind = kind, .id = id, .key = key
	};

	return (int)run_in_ipcns(&request);
}
