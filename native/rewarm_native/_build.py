"""Compiles `rewarm_native._native` by cffi's API mode, and writes `_cuda.py`, declarations for ABI mode: no compiler
and no parsing at import time.

setup.py names `ffibuilder` and `cuda` to setuptools. `python3 native/rewarm_native/_build.py` compiles into the source
tree, for work on it without an install.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI  # type: ignore[import-untyped, unused-ignore]

_HERE = Path(__file__).resolve().parent
_HEADERS = ("native.h", "tracing.h", "borrow.h", "detour.h")
_SOURCES = ("process.c", "tracing.c", "borrow.c", "mempolicy.c", "detour.c", "advise.c", "memory.c")

# The declarations of native.h that Python uses; the compiler checks them against it.
_DECLARATIONS = """
struct rw_policy {
    uint64_t start;
    uint64_t length;
    int32_t mode;
    uint32_t flags;
    uint64_t nodes[16];
};

struct rw_way {
    uint64_t call;
    uint64_t restorer;
};

int rw_set_child_subreaper(int on);
int rw_set_pdeathsig(int signal);
int rw_socket_in_netns(int namespace_fd, int family, int type, int protocol);
int rw_set_policies(int tid, const struct rw_policy *policies, size_t count, size_t *failed);
int rw_watch_begin(int tid, struct rw_way *way);
int rw_watch(const struct rw_way *way, uint64_t smallest);
size_t rw_nonzero_pages(const void *data, size_t pages, uint8_t *mask);
size_t rw_equal_pages(const void *one, const void *other, size_t pages, uint8_t *mask);
size_t rw_pack_pages(void *data, size_t pages, const uint8_t *mask);
int rw_write_pages(int pid, int pidfd, uint64_t base, const uint8_t *mask, const void *data, size_t length);
int rw_write_forced(int memory_fd, uint64_t base, const uint8_t *mask, const void *data, size_t length);
"""

# cuda.h, from CUDA 12.8 on; checked by no compiler, since no CUDA is there. Every structure of arguments has 64 bytes,
# the reserved ones zero.
_CUDA = """
typedef int CUresult;
typedef struct { unsigned char bytes[16]; } CUuuid;
typedef struct { unsigned int timeoutMs; unsigned int reserved0; uint64_t reserved1[7]; } CUcheckpointLockArgs;
typedef struct { uint64_t reserved[8]; } CUcheckpointCheckpointArgs;
typedef struct { CUuuid oldUuid; CUuuid newUuid; } CUcheckpointGpuPair;
typedef struct {
    CUcheckpointGpuPair *gpuPairs; unsigned int gpuPairsCount; char reserved[52];
} CUcheckpointRestoreArgs;
typedef struct { uint64_t reserved[8]; } CUcheckpointUnlockArgs;
CUresult cuDriverGetVersion(int *version);
CUresult cuGetErrorName(CUresult error, const char **name);
CUresult cuCheckpointProcessGetState(int pid, int *state);
CUresult cuCheckpointProcessGetRestoreThreadId(int pid, int *tid);
CUresult cuCheckpointProcessLock(int pid, CUcheckpointLockArgs *args);
CUresult cuCheckpointProcessCheckpoint(int pid, CUcheckpointCheckpointArgs *args);
CUresult cuCheckpointProcessRestore(int pid, CUcheckpointRestoreArgs *args);
CUresult cuCheckpointProcessUnlock(int pid, CUcheckpointUnlockArgs *args);
"""


def _source() -> str:
    """All C as one text: a change of any file then changes the module, which is what setuptools looks at."""
    texts = []
    for name in (*_HEADERS, *_SOURCES):
        text = (_HERE / name).read_text(encoding="utf-8")
        for header in _HEADERS:
            text = text.replace(f'#include "{header}"\n', "\n")
        texts.append(f'#line 1 "{name}"\n{text}')
    return "\n".join(texts)


ffibuilder = FFI()
ffibuilder.cdef(_DECLARATIONS)
ffibuilder.set_source(
    "rewarm_native._native",
    _source(),
    extra_compile_args=["-std=gnu17", "-O3", "-Wall", "-Wextra", "-fstack-protector-strong", "-pthread"],
    extra_link_args=["-pthread", "-Wl,-z,relro,-z,now"],
)

cuda = FFI()
cuda.cdef(_CUDA)
cuda.set_source("rewarm_native._cuda", None)

if __name__ == "__main__":
    cuda.compile(tmpdir=str(_HERE.parent), verbose=True)
    ffibuilder.compile(tmpdir=str(_HERE.parent), verbose=True)
