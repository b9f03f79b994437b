/* What Python calls: thin, without state, every result a return value. The C files beside it are compiled as one. */
#ifndef REWARM_NATIVE_H
#define REWARM_NATIVE_H

#include <stddef.h>
#include <stdint.h>

enum { RW_NODE_WORDS = 16 }; /* 1024 nodes, the most that Linux can be built for */

/* One set_mempolicy(2) (length 0) or mbind(2). */
struct rw_policy {
	uint64_t start;
	uint64_t length;
	int32_t mode;
	uint32_t flags; /* of mbind */
	uint64_t nodes[RW_NODE_WORDS];
};

/* All return -errno on failure. */
int rw_set_child_subreaper(int on);
int rw_set_pdeathsig(int signal);

/* A socket (close-on-exec) of the network namespace behind `namespace_fd`; the caller stays where it is. */
int rw_socket_in_netns(int namespace_fd, int family, int type, int protocol);

/* Runs the calls in the thread `tid` of another process, in order, up to the first that fails; *failed is then its
 * index, or `count` when the thread could not be made to run anything. Afterwards the thread is as it was. */
int rw_set_policies(int tid, const struct rw_policy *policies, size_t count, size_t *failed);

/* Addresses of instructions in a process (detour.c). */
struct rw_way {
	uint64_t call;
	uint64_t restorer;
};

/* From the first call on the calling thread traces the thread `tid`, which the second lets go on; both have to be made
 * by one thread, which then has to end. Private anonymous mappings of at least `smallest` bytes that `tid` makes, writable,
 * are told to use huge pages. The second returns when `tid` has ended (0) or cannot be watched any longer. */
int rw_watch_begin(int tid, struct rw_way *way);
int rw_watch(const struct rw_way *way, uint64_t smallest);

/* Memory, in pages of 4096 bytes. A mask has bit N % 8 of byte N / 8 for page N. Data is page-aligned. */

/* Sets the bits of the pages that hold anything but zeros (that are equal); returns how many. */
size_t rw_nonzero_pages(const void *data, size_t pages, uint8_t *mask);
size_t rw_equal_pages(const void *one, const void *other, size_t pages, uint8_t *mask);

/* Moves the pages of the mask together, to the beginning; returns how many. */
size_t rw_pack_pages(void *data, size_t pages, const uint8_t *mask);

/* Writes `length` bytes to the pages of a mask of 512 bits that counts from `base`: as the process itself could, or
 * (through an open /proc/PID/mem) to private pages that it cannot write too. */
int rw_write_pages(int pid, int pidfd, uint64_t base, const uint8_t *mask, const void *data, size_t length);
int rw_write_forced(int memory_fd, uint64_t base, const uint8_t *mask, const void *data, size_t length);

#endif
