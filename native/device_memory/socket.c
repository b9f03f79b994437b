#include "socket.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A program that counts on low numbers being free, or that closes a few, does not meet these. */
enum { LEAST_NUMBER = 64, DESCRIPTORS = 16 };

struct end {
	int number;
	dev_t device;
	ino_t inode;
};

static struct end own = { .number = -1 }, other = { .number = -1 };

/* fstat(3) is no function in glibc before 2.33. */
static bool look(int number, struct stat *status)
{
	return syscall(SYS_fstat, number, status) == 0;
}

static bool note(struct end *end)
{
	struct stat status;

	if (!look(end->number, &status))
		return false;
	end->device = status.st_dev;
	end->inode = status.st_ino;
	return true;
}

static bool unchanged(const struct end *end)
{
	struct stat status;

	return end->number >= 0 && look(end->number, &status) && status.st_dev == end->device && status.st_ino == end->inode;
}

static int move_up(int number)
{
	int higher = fcntl(number, F_DUPFD_CLOEXEC, LEAST_NUMBER);

	if (higher < 0)
		return number;
	close(number);
	return higher;
}

int rw_socket_open(void)
{
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
		return -1;
	own.number = move_up(pair[0]);
	other.number = move_up(pair[1]);
	if (note(&own) && note(&other))
		return other.number;
	rw_socket_close();
	return -1;
}

void rw_socket_close(void)
{
	if (unchanged(&own))
		close(own.number);
	if (unchanged(&other))
		close(other.number);
	own.number = other.number = -1;
}

/* An empty packet looks like the end. */
static bool hung_up(void)
{
	struct pollfd wanted = { .fd = own.number, .events = POLLRDHUP };

	return poll(&wanted, 1, 0) != 0 && (wanted.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

static bool wait_until_readable(void)
{
	struct pollfd wanted = { .fd = own.number, .events = POLLIN };

	return poll(&wanted, 1, -1) >= 0 || errno == EINTR;
}

static bool is_request(ssize_t size, const struct rw_message *request)
{
	return size == (ssize_t)sizeof(*request) && request->magic == RW_MAGIC;
}

/* Also of messages with something else aboard, which a program that has the socket may turn on. */
static int take_descriptors(struct msghdr *header)
{
	int kept = -1;

	for (struct cmsghdr *part = CMSG_FIRSTHDR(header); part != NULL; part = CMSG_NXTHDR(header, part)) {
		if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t at = CMSG_LEN(0); at + sizeof(int) <= part->cmsg_len; at += sizeof(int)) {
			int one;

			memcpy(&one, (unsigned char *)part + at, sizeof(one));
			if (kept < 0)
				kept = one;
			else
				close(one);
		}
	}
	return kept;
}

/* Those for which there is no room the kernel closes. */
static ssize_t take(struct rw_message *request, int *descriptor)
{
	union {
		struct cmsghdr align;
		unsigned char bytes[CMSG_SPACE(DESCRIPTORS * sizeof(int))];
	} control;
	struct iovec data = { .iov_base = request, .iov_len = sizeof(*request) };
	struct msghdr header = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = &control,
				 .msg_controllen = sizeof(control) };

	ssize_t size = recvmsg(own.number, &header, MSG_CMSG_CLOEXEC | MSG_TRUNC | MSG_DONTWAIT);
	*descriptor = size < 0 ? -1 : take_descriptors(&header);
	return size;
}

/* The program may have closed the number and opened a socket of its own under it, from which nothing must be taken. So
 * there is a look before, which does not wait, since a wait is for the file that the number had when it began. The
 * inode alone does not tell, since CRIU makes the socket anew. */
bool rw_socket_receive(struct rw_message *request, int *descriptor)
{
	for (;;) {
		ssize_t size = recv(own.number, request, sizeof(*request), MSG_PEEK | MSG_TRUNC);

		if (size < 0 && (errno == EINTR || (errno == EAGAIN && wait_until_readable())))
			continue;
		if (size >= 0)
			size = recv(own.number, request, sizeof(*request), MSG_PEEK | MSG_TRUNC | MSG_DONTWAIT);
		if (size < 0 && errno == EAGAIN && unchanged(&own))
			continue;
		if (size < 0 || (size == 0 && hung_up()))
			return false;
		bool good = is_request(size, request);
		if (good ? !note(&own) : !unchanged(&own))
			return false;
		size = take(request, descriptor);
		if (is_request(size, request))
			return true;
		if (*descriptor >= 0)
			close(*descriptor);
	}
}

void rw_socket_send(const struct rw_message *answer, int descriptor)
{
	union {
		struct cmsghdr part;
		unsigned char bytes[CMSG_SPACE(sizeof(int))];
	} control = { .part = { .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int)) } };
	struct rw_message copy = *answer;
	struct iovec data = { .iov_base = &copy, .iov_len = sizeof(copy) };
	struct msghdr header = { .msg_iov = &data, .msg_iovlen = 1 };

	if (descriptor >= 0) {
		memcpy(CMSG_DATA(&control.part), &descriptor, sizeof(descriptor));
		header.msg_control = &control;
		header.msg_controllen = sizeof(control);
	}
	/* Nobody to tell: the next receive finds out. */
	while (sendmsg(own.number, &header, MSG_NOSIGNAL) < 0 && errno == EINTR)
		;
}
