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
int rw_names_in_utsns(int namespace_fd, char *nodename, char *domainname, size_t size);
int rw_set_last_pid(int namespace_fd, int pid);
int rw_mount_tmpfs(const char *path, const char *options);

/* Of the IPC namespace behind `namespace_fd` (ipc.c). A new one, as a descriptor that is close-on-exec; a file of /proc,
 * as a count of bytes, E2BIG if `size` are not more than it has; who has used each semaphore of a set last, of which it
 * returns the number; and one System V object less, if it has that key. */
enum { RW_SHM, RW_MSG, RW_SEM };
int rw_new_ipcns(void);
int64_t rw_read_in_ipcns(int namespace_fd, const char *path, char *buffer, size_t size);
int64_t rw_sem_pids_in_ipcns(int namespace_fd, int id, int32_t *pids, size_t size);
int rw_remove_in_ipcns(int namespace_fd, int kind, int id, int key);

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

/* A descriptor of another process, close-on-exec: pidfd_getfd(2), Linux 5.6. */
int rw_get_fd(int pidfd, int fd);

/* Loads a shared library for good. Returns 0, or -1 with the loader's words in `error`, which has `size` bytes. */
int rw_load_library(const char *path, char *error, size_t size);

/* In a process that a signal has stopped (group stop), has the thread `tid` run all the same: the calling thread traces
 * it from then on. If that one ends, `tid` stops again, as the others. No signal is delivered to it meanwhile; *mask are
 * those that it blocked before. */
int rw_rouse(int tid, uint64_t *mask);

/* Has go on what is stopped of the threads that the calling one has roused, and of those that they have made. 1 if there
 * was anything to do, 0 if not; *born is then a thread that is new or has been stopped again. */
int rw_keep_awake(int *born);

/* Undoes rw_rouse: the thread stops with the others, or runs on if they do. */
int rw_let_sleep(int tid, uint64_t mask);

/* Functions of the CUDA driver, by address (cuda.h): cuMemcpyHtoDAsync, cuMemcpyDtoHAsync, cuEventRecord,
 * cuEventSynchronize. */
struct rw_lane_calls {
	void *upload;
	void *download;
	void *record;
	void *wait;
};

/* Copies `size` bytes in a stream, of an upload to each of `count` addresses, and has the event follow them. Of `next`, if
 * it is not NULL, the end is waited for: in one call, since Python would take its lock in between. Return the driver's
 * CUresult. */
int rw_upload(const struct rw_lane_calls *calls, const uint64_t *devices, size_t count, const void *host, size_t size,
	      void *stream, void *event, void *next);
int rw_download(const struct rw_lane_calls *calls, void *host, uint64_t device, size_t size, void *stream, void *event);

/* Some windows that lie one after the other in a file. */
struct rw_run {
	uint64_t offset;
	uint64_t windows;
};

/* Pinned buffers in turn, each with room for the longest run, and an event of each. Buffer `next` is free. */
struct rw_ring {
	void *const *buffers;
	void *const *events;
	size_t slots;
	size_t next;
};

/* Brings runs of a file that are in the page cache to the GPU, window by window of `size` bytes to these addresses, as
 * rw_upload does with the ring's next event. Ends before the first run that is not there as a whole, or cannot be read:
 * *done is how many are on their way, and all but the last slots - 1 have come; *refused, whether the file cannot be asked
 * what of it is there. Returns the driver's CUresult. */
int rw_upload_file(const struct rw_lane_calls *calls, int fd, const struct rw_run *runs, size_t count,
		   const uint64_t *devices, size_t size, void *stream, struct rw_ring *ring, size_t *done,
		   int *refused);

/* Memory of the GPU by the driver's virtual memory API, one piece after the other: makes pieces of these sizes with
 * `properties` (CUmemAllocationProp), maps them one behind the other from `address` on, or makes a descriptor of each, of
 * handle type `type`. `create`, `map` and `export` are cuMemCreate, cuMemMap and cuMemExportToShareableHandle. They end at
 * the first that fails: *done is how many are made. Return the driver's CUresult. */
int rw_create_pieces(void *create, const void *properties, const uint64_t *sizes, size_t count, uint64_t *handles,
		     size_t *done);
int rw_map_pieces(void *map, uint64_t address, const uint64_t *sizes, const uint64_t *handles, size_t count,
		  size_t *done);
int rw_export_pieces(void *export, const uint64_t *handles, size_t count, int type, int *fds, size_t *done);

/* Has the kernel find the pages of a mapping of this process now (madvise(2), MADV_POPULATE_WRITE: Linux 5.14). Returns 0
 * or -errno. */
int rw_populate(void *start, size_t size);

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

/* Whether a file's page is in the page cache: 1, 0 or -errno. Nothing is read. */
int rw_is_cached(int fd, uint64_t offset);

#endif
