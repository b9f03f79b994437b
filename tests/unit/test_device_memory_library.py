"""rewarm-device-memory.so as a file: what it asks of a container, and what it leaves alone there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support import device_program
from support.device_program import FLAVOURS, SECONDS, Built

EXPORTED = {
    "cuCtxDisablePeerAccess",
    "cuCtxEnablePeerAccess",
    "cuDevicePrimaryCtxReset",
    "cuDevicePrimaryCtxReset_v2",
    "cuIpcGetMemHandle",
    "cuMemAlloc_v2",
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemFreeAsync",
    "cuMemFreeAsync_ptsz",
    "cuMemFree_v2",
    "cuMemGetAddressRange_v2",
    "cuMemGetAllocationPropertiesFromHandle",
    "cuMemImportFromShareableHandle",
    "cuMemMap",
    "cuMemRelease",
    "cuMemRetainAllocationHandle",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMulticastBindAddr",
    "cuMulticastBindAddr_v2",
    "cuMulticastBindMem",
    "cuMulticastBindMem_v2",
    "cuMulticastCreate",
    "cuGetProcAddress",
    "cuGetProcAddress_v2",
    "cudaDeviceDisablePeerAccess",
    "cudaDeviceEnablePeerAccess",
    "cudaDeviceReset",
    "cudaFree",
    "cudaFreeAsync",
    "cudaFreeAsync_ptsz",
    "cudaGetDriverEntryPoint",
    "cudaGetDriverEntryPointByVersion",
    "cudaGetDriverEntryPointByVersion_ptsz",
    "cudaGetDriverEntryPoint_ptsz",
    "cudaIpcGetMemHandle",
    "cudaMalloc",
}
# Functions of every libc from glibc 2.17 on (libpthread and libdl apart until 2.34), and of musl.
NEEDED = {
    "__errno_location", "__stack_chk_fail", "__stack_chk_guard", "calloc", "close", "fcntl", "free", "memcpy",
    "memset", "mmap", "munmap", "poll", "prctl", "recv", "recvmsg", "sched_yield", "sendmsg", "sigfillset",
    "sigprocmask", "socketpair", "strlen", "strncmp", "strrchr", "syscall", "write",
}  # fmt: skip
WEAK = {
    "__register_atfork", "dl_iterate_phdr", "dlclose", "dlerror", "dlopen", "dlsym", "dlvsym", "pthread_atfork",
    "pthread_attr_destroy", "pthread_attr_init", "pthread_attr_setdetachstate", "pthread_attr_setstacksize",
    "pthread_create",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return device_program.build(tmp_path_factory.getbasetemp(), "plain")


@pytest.fixture(scope="module", params=FLAVOURS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return device_program.build(tmp_path_factory.getbasetemp(), request.param)


def symbols(library: Path) -> list[tuple[str, str, str]]:
    """Binding, section and name of the dynamic ones."""
    lines = device_program.output_of("readelf", "-W", "--dyn-syms", library).splitlines()[3:]
    return [(words[4], words[6], words[7]) for line in lines if len(words := line.split()) > 7]


def test_it_exports_what_it_stands_in_front_of_and_nothing_else(plain: Built) -> None:
    assert {name for _, section, name in symbols(plain.library) if section != "UND"} == EXPORTED


def test_it_fits_every_libc(plain: Built) -> None:
    undefined = [(binding, name) for binding, section, name in symbols(plain.library) if section == "UND"]
    assert {name for binding, name in undefined if binding == "GLOBAL"} <= NEEDED
    assert {name for binding, name in undefined if binding == "WEAK"} == WEAK
    assert "NEEDED" not in device_program.output_of("readelf", "-d", plain.library)
    assert "No version information" in device_program.output_of("readelf", "-V", plain.library)


def test_it_does_nothing_at_load(plain: Built) -> None:
    dynamic = device_program.output_of("readelf", "-d", plain.library)
    assert not any(word in dynamic for word in ("INIT", "FINI", "TEXTREL"))
    assert "TLS" not in device_program.output_of("readelf", "-lW", plain.library)


def test_a_build_is_reproducible_and_names_no_place(plain: Built, tmp_path: Path) -> None:
    again = device_program.make_library(tmp_path).read_bytes()
    assert again == plain.library.read_bytes()
    assert str(device_program.REPOSITORY).encode() not in again


@pytest.mark.parametrize("name", ["bare", "bare-static"])
def test_a_program_without_cuda_has_no_thread_and_no_descriptor_more(built: Built, name: str) -> None:
    program = built.directory / name
    alone = subprocess.run([program], check=True, capture_output=True, text=True, timeout=SECONDS)
    loaded = subprocess.run([program], env=built.environment(), capture_output=True, text=True, timeout=SECONDS)
    assert loaded.returncode == 0 and loaded.stderr == "" and loaded.stdout == alone.stdout
    assert alone.stdout.startswith("1 ")


def test_programs_of_the_machine_run(plain: Built) -> None:
    for command in (["true"], [sys.executable, "-c", "import threading"], ["sh", "-c", "ls / | cat"]):
        done = subprocess.run(command, env=plain.environment(), capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("name", ["plugin.so", "plugin-hashed.so", "plugin-own.so"])
def test_a_plugin_whose_libraries_nobody_else_sees(built: Built, name: str) -> None:
    command = [built.directory / "host", built.directory / name]
    done = subprocess.run(command, env=built.environment(), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0 and done.stderr == ""
    assert any(line.startswith("rewarm-mem-") for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", ["", "libcuda.so"])
def test_python_with_an_extension(plain: Built, tmp_path: Path, name: str) -> None:
    """`name`: how somebody has loaded the driver before, and the loader knows it by that from then on."""
    (tmp_path / "libcuda.so").symlink_to(plain.directory / "libcuda.so.1")
    code = f"""
import ctypes, pathlib
if {name!r}:
    ctypes.CDLL({str(tmp_path / name)!r})
plugin = ctypes.CDLL({str(plain.directory / "plugin.so")!r})
pointer = ctypes.c_void_p()
assert plugin.plugin_allocate(ctypes.byref(pointer), ctypes.c_size_t(4 << 20)) == 0
print(*(path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")))
assert plugin.plugin_free(pointer) == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain.environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "rewarm-mem-" in done.stdout


@pytest.mark.parametrize("first", [True, False])
def test_another_that_stands_in_front_of_cuda_has_its_calls(plain: Built, first: bool) -> None:
    """Behind it, what it passes on is served; in front of it, nothing is: it would not see it."""
    other = plain.directory / "between.so"
    code = f"""
import ctypes, pathlib
other = ctypes.CDLL({str(other)!r})
plugin = ctypes.CDLL({str(plain.directory / "plugin.so")!r})
pointer = ctypes.c_void_p()
for size in (4 << 20, 1000, 8 << 20):
    assert plugin.plugin_allocate(ctypes.byref(pointer), ctypes.c_size_t(size)) == 0
    assert plugin.plugin_free(pointer) == 0
names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
print(other.between_calls(), any(name.startswith("rewarm-mem-") for name in names))
"""
    order = [other, plain.library] if first else [plain.library, other]
    env = plain.environment(*order)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=SECONDS)
    assert (done.stdout, done.stderr) == (f"3 {first}\n", "")


@pytest.mark.parametrize(
    ("library", "program"),
    [
        *((f"limiter{kind}.so", program) for kind in ("", "-create", "-hidden") for program in ("host", "host-linked")),
        ("limiter.so", "address-pie"),
        ("limiter-direct.so", "address-pie"),
    ],
)
@pytest.mark.parametrize("behind", [True, False])
def test_a_limiter_of_device_memory_sees_what_it_saw(plain: Built, library: str, program: str, behind: bool) -> None:
    """One that stands in front of the driver: whether the program is linked to that, asks it itself, or does not, and
    whoever is preloaded first."""
    limiter = plain.directory / library
    command = [plain.directory / program, plain.directory / "plugin.so"]

    def said(*order: Path) -> list[str]:
        env = plain.environment(*order)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0 and "rewarm-mem-" not in done.stdout
        return done.stderr.splitlines()

    alone = said(limiter)
    assert alone and all(line.startswith("limiter: ") for line in alone)
    assert any(line == f"limiter: alloc {4 << 20}" for line in alone)
    assert said(*([plain.library, limiter] if behind else [limiter, plain.library])) == alone


@pytest.mark.parametrize("way", ["runtime", "driver"])
@pytest.mark.parametrize("program", ["address", "address-pie"])
def test_a_program_that_has_the_addresses_of_the_drivers_functions(plain: Built, program: str, way: str) -> None:
    command = [str(plain.directory / program), *(["driver"] if way == "driver" else [])]
    done = subprocess.run(command, env=plain.environment(), capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rewarm-mem-" in done.stdout


def test_two_runtimes_of_which_one_has_a_name_of_its_own(plain: Built) -> None:
    """Neither stands in front of the other."""
    code = f"""
import ctypes, pathlib
first = ctypes.CDLL({str(plain.directory / "plugin-hashed.so")!r}, mode=ctypes.RTLD_GLOBAL)
second = ctypes.CDLL({str(plain.directory / "plugin.so")!r}, mode=ctypes.RTLD_GLOBAL)
pointer = ctypes.c_void_p()
for plugin in (first, second):
    assert plugin.plugin_allocate(ctypes.byref(pointer), ctypes.c_size_t(4 << 20)) == 0
    assert plugin.plugin_free(pointer) == 0
print(any(path.read_text().startswith("rewarm-mem-") for path in pathlib.Path("/proc/self/task").glob("*/comm")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain.environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_without_a_cuda_library_the_answer_is_an_error(plain: Built) -> None:
    code = f"""
import ctypes
library = ctypes.CDLL({str(plain.library)!r})
pointer = ctypes.c_void_p()
print(library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(4 << 20)))
print(library.cudaFree(None), library.cuMemFree_v2(0))
"""
    assert device_program.output_of(sys.executable, "-c", code) == "3\n3 3"
