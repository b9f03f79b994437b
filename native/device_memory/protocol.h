/* What goes over the control socket, both ways, as packets of 64 bytes in the layout of this machine. Every request has
 * its answers in order, each with `op` and `sequence` of the request. A packet that is no request has none.
 *
 * The thread named rewarm-mem-N serves one end; N is the descriptor of the other, for pidfd_getfd(2). That end stays
 * open in the process. Of EXPORT, UNMAP and OWN the caller sees to it that the device works on nothing of the program's.
 * Answers that nobody read are found by the next who asks: `sequence` tells them apart.
 */
#ifndef REWARM_DEVICE_MEMORY_PROTOCOL_H
#define REWARM_DEVICE_MEMORY_PROTOCOL_H

#include <stdint.h>

enum { RW_MAGIC = 0x314d4452, RW_VERSION = 1 };

enum rw_op {
	RW_HELLO = 1,  /* size, count: of all pieces; address: bytes of imported ones; device: RW_VERSION */
	RW_LIST = 2,   /* an answer a piece by ascending address, count: enum rw_state; at the end size 0, count: how many,
		        * address: threads in the middle of serving or freeing one */
	RW_OWN = 3,    /* an imported piece becomes memory of the process's own, which can be exported; a copy on the device */
	RW_EXPORT = 4, /* the answer carries a descriptor of the piece's memory */
	RW_UNMAP = 5,  /* the memory goes, the address stays */
	RW_MAP = 6,    /* the request carries a descriptor, whose memory comes to the address of a piece that is away */
};

enum rw_state { RW_IMPORTED = 1, RW_AWAY = 2 };

struct rw_message {
	uint32_t magic;
	uint32_t op;
	uint64_t sequence;
	int32_t status;	 /* 0, a CUresult, or -errno: ENOENT no such piece (or it is away), ENOSYS no such op, EAGAIN the
			  * table is locked by a thread that stands still, EBADF a MAP without a descriptor */
	uint32_t device; /* its ordinal in this process */
	uint64_t address, size, count;
	uint8_t uuid[16];
};

_Static_assert(sizeof(struct rw_message) == 64, "the protocol");

#endif
