"""Compiles `rewarm_native._native` by cffi's API mode: no compiler and no parsing at import time.

setup.py names `ffibuilder` to setuptools. `python3 native/rewarm_native/_build.py` compiles into the source tree, for
work on it without an install.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI  # type: ignore[import-untyped, unused-ignore]

_HERE = Path(__file__).resolve().parent
_SOURCES = ("process.c", "mempolicy.c", "memory.c")

# The declarations of native.h that Python uses; the compiler checks them against it.
_DECLARATIONS = """
struct rw_policy {
    uint64_t start;
    uint64_t length;
    int32_t mode;
    uint32_t flags;
    uint64_t nodes[16];
};

int rw_set_child_subreaper(int on);
int rw_set_pdeathsig(int signal);
int rw_socket_in_netns(int namespace_fd, int family, int type, int protocol);
int rw_set_policies(int tid, const struct rw_policy *policies, size_t count, size_t *failed);
size_t rw_nonzero_pages(const void *data, size_t pages, uint8_t *mask);
size_t rw_equal_pages(const void *one, const void *other, size_t pages, uint8_t *mask);
size_t rw_pack_pages(void *data, size_t pages, const uint8_t *mask);
int rw_write_pages(int pid, int pidfd, uint64_t base, const uint8_t *mask, const void *data, size_t length);
int rw_write_forced(int memory_fd, uint64_t base, const uint8_t *mask, const void *data, size_t length);
"""


def _source() -> str:
    """All C as one text: a change of any file then changes the module, which is what setuptools looks at."""
    texts = ['#line 1 "native.h"\n' + (_HERE / "native.h").read_text(encoding="utf-8")]
    for name in _SOURCES:
        text = (_HERE / name).read_text(encoding="utf-8").replace('#include "native.h"\n', "\n")
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

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(_HERE.parent), verbose=True)
