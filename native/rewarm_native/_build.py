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
_SOURCES = (
    "process.c",
    "ipc.c",
    "tracing.c",
    "borrow.c",
    "mempolicy.c",
    "detour.c",
    "advise.c",
    "awake.c",
    "lanes.c",
    "pieces.c",
    "memory.c",
    "page_cache.c",
)

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
int rw_names_in_utsns(int namespace_fd, char *nodename, char *domainname, size_t size);
int rw_set_last_pid(int namespace_fd, int pid);
int rw_mount_tmpfs(const char *path, const char *options);
int rw_new_ipcns(void);
int64_t rw_read_in_ipcns(int namespace_fd, const char *path, char *buffer, size_t size);
int64_t rw_sem_pids_in_ipcns(int namespace_fd, int id, int32_t *pids, size_t size);
int rw_remove_in_ipcns(int namespace_fd, int kind, int id, int key);
int rw_set_policies(int tid, const struct rw_policy *policies, size_t count, size_t *failed);
int rw_watch_begin(int tid, struct rw_way *way);
int rw_watch(const struct rw_way *way, uint64_t smallest);
int rw_get_fd(int pidfd, int fd);
int rw_load_library(const char *path, char *error, size_t size);
int rw_rouse(int tid, uint64_t *mask);
int rw_keep_awake(int *born);
int rw_let_sleep(int tid, uint64_t mask);

struct rw_lane_calls {
    void *upload;
    void *download;
    void *record;
    void *wait;
};

int rw_upload(const struct rw_lane_calls *calls, const uint64_t *devices, size_t count, const void *host, size_t size,
              void *stream, void *event, void *next);
int rw_download(const struct rw_lane_calls *calls, void *host, uint64_t device, size_t size, void *stream, void *event);

struct rw_run {
    uint64_t offset;
    uint64_t windows;
};
struct rw_ring {
    void *const *buffers;
    void *const *events;
    size_t slots;
    size_t next;
};

int rw_upload_file(const struct rw_lane_calls *calls, int fd, const struct rw_run *runs, size_t count,
                   const uint64_t *devices, size_t size, void *stream, struct rw_ring *ring, size_t *done,
                   int *refused);
int rw_create_pieces(void *create, const void *properties, const uint64_t *sizes, size_t count, uint64_t *handles,
                     size_t *done);
int rw_map_pieces(void *map, uint64_t address, const uint64_t *sizes, const uint64_t *handles, size_t count,
                  size_t *done);
int rw_export_pieces(void *export, const uint64_t *handles, size_t count, int type, int *fds, size_t *done);
int rw_populate(void *start, size_t size);
size_t rw_nonzero_pages(const void *data, size_t pages, uint8_t *mask);
size_t rw_equal_pages(const void *one, const void *other, size_t pages, uint8_t *mask);
size_t rw_pack_pages(void *data, size_t pages, const uint8_t *mask);
int rw_write_pages(int pid, int pidfd, uint64_t base, const uint8_t *mask, const void *data, size_t length);
int rw_write_forced(int memory_fd, uint64_t base, const uint8_t *mask, const void *data, size_t length);
int rw_is_cached(int fd, uint64_t offset);
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
typedef uint64_t CUdeviceptr;
typedef uint64_t CUmemGenericAllocationHandle;
typedef struct { int type; int id; } CUmemLocation;
typedef struct {
    int type; int requestedHandleTypes; CUmemLocation location; void *win32HandleMetaData;
    struct { unsigned char compressionType; unsigned char gpuDirectRDMACapable; unsigned short usage;
             unsigned char reserved[4]; } allocFlags;
} CUmemAllocationProp;
typedef struct { CUmemLocation location; int flags; } CUmemAccessDesc;
CUresult cuInit(unsigned int flags);
CUresult cuDeviceGetCount(int *count);
CUresult cuDeviceGet(int *device, int ordinal);
CUresult cuDeviceGetAttribute(int *value, int attribute, int device);
CUresult cuDeviceGetUuid_v2(CUuuid *uuid, int device);
CUresult cuDevicePrimaryCtxRetain(void **context, int device);
CUresult cuDevicePrimaryCtxRelease_v2(int device);
CUresult cuCtxSetCurrent(void *context);
CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop,
                     uint64_t flags);
CUresult cuMemGetInfo_v2(size_t *free, size_t *total);
CUresult cuMemRelease(CUmemGenericAllocationHandle handle);
CUresult cuMemAddressReserve(CUdeviceptr *ptr, size_t size, size_t alignment, CUdeviceptr addr, uint64_t flags);
CUresult cuMemAddressFree(CUdeviceptr ptr, size_t size);
CUresult cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle, uint64_t flags);
CUresult cuMemUnmap(CUdeviceptr ptr, size_t size);
CUresult cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc *desc, size_t count);
CUresult cuMemExportToShareableHandle(void *fd, CUmemGenericAllocationHandle handle, int type, uint64_t flags);
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *fd, int type);
CUresult cuMemHostRegister_v2(void *p, size_t size, unsigned int flags);
CUresult cuMemHostUnregister(void *p);
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *device, void *p, unsigned int flags);
CUresult cuLinkCreate_v2(unsigned count, int *options, void **values, void **state);
CUresult cuLinkAddData_v2(void *state, int type, void *data, size_t size, const char *name, unsigned count,
                          int *options, void **values);
CUresult cuLinkComplete(void *state, void **code, size_t *size);
CUresult cuLinkDestroy(void *state);
CUresult cuModuleLoadData(void **module, const void *image);
CUresult cuModuleGetFunction(void **function, void *module, const char *name);
CUresult cuLaunchKernel(void *function, unsigned int blocks_x, unsigned int blocks_y, unsigned int blocks_z,
                        unsigned int threads_x, unsigned int threads_y, unsigned int threads_z, unsigned int shared,
                        void *stream, void **parameters, void **extra);
CUresult cuStreamCreate(void **stream, unsigned int flags);
CUresult cuStreamSynchronize(void *stream);
CUresult cuEventCreate(void **event, unsigned int flags);
CUresult cuEventRecord(void *event, void *stream);
CUresult cuEventSynchronize(void *event);
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, void *stream);
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, void *stream);
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, void *stream);
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, void *stream);
CUresult cuDriverGetVersion(int *version);
CUresult cuGetErrorName(CUresult error, const char **name);
CUresult cuCheckpointOperationComplete(void);
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
    extra_link_args=["-pthread", "-ldl", "-Wl,-z,relro,-z,now"],
)

cuda = FFI()
cuda.cdef(_CUDA)
cuda.set_source("rewarm_native._cuda", None)

if __name__ == "__main__":
    cuda.compile(tmpdir=str(_HERE.parent), verbose=True)
    ffibuilder.compile(tmpdir=str(_HERE.parent), verbose=True)
