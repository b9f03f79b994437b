/* The fake driver's inside. Formats of the page and of the files: fake_gpu.py. */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include "fake_node.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* CUresult, as far as the real driver was seen to give them here. */
enum {
	OK = 0,
	INVALID_VALUE = 1,
	OUT_OF_MEMORY = 2,
	NOT_INITIALIZED = 3,
	NO_DEVICE = 100,
	INVALID_DEVICE = 101,
	OPERATING_SYSTEM = 304,
	ILLEGAL_STATE = 401,
	NOT_READY = 600,
	NOT_PERMITTED = 800,
	NOT_SUPPORTED = 801,
	UNKNOWN = 999,
};

enum { RUNNING, LOCKED, CHECKPOINTED, FAILED };
enum { MANAGED = 1, MPS = 2, BUSY = 4 };

#define PAGE_ADDRESS 0x7ca000000000u
#define PAGE_MAGIC 0x41445543454b4146u /* "FAKECUDA" */

struct page {
	uint64_t magic;
	uint32_t state, flags;
	uint64_t region, size; /* where the process's device memory goes at a checkpoint */
	uint32_t beats;	       /* counted up by a thread of the process for as long as that may run */
	uint32_t thread;       /* that thread's id, in the process's own pid namespace */
	uint32_t in_flight;    /* calls that the process is in the middle of */
	uint32_t reserved;
	unsigned char uuid[16];
	char token[32]; /* the file in devices/UUID that is its device memory */
};

enum call_kind { STATE, THREAD, LOCK, CHECKPOINT, RESTORE, UNLOCK, KINDS };
extern const char *const CALL_NAMES[KINDS];

/* What the file `script` says about one call, and about all. */
struct script {
	int result; /* OK: nothing */
	unsigned sleep_ms, patience_ms;
	bool kill_target, kill_caller, nodes;
};

int read_page(pid_t pid, struct page *page);
int set_word(pid_t pid, size_t offset, uint32_t value);
int move(pid_t pid, uint64_t address, void *data, size_t size, bool write);

void read_script(struct script *script, enum call_kind kind);
void write_log(uint64_t begin, enum call_kind kind, pid_t pid, int result, const char *map);
uint64_t now_ns(void);

int device_out(pid_t pid, const struct page *page);
int device_gone(const struct page *page);
int device_in(pid_t pid, struct page *page, const unsigned char target[static 16], bool nodes);
void uuid_text(char text[static 64], const unsigned char uuid[static 16]);

#endif
