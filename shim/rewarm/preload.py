"""The device memory library in a container: a file of its own, of which nothing changes while the container lives.

Processes have it mapped, so a snapshot carries it, and a restored container gets that one, whatever version the node
has. CRIU wants a mapped file to have the mode that it had (criu/files-reg.c).
"""

from __future__ import annotations

import os

from rewarm import installation
from rewarm.gpu import visible
from rewarm.oci import spec
from rewarm.oci.spec import Spec, write_atomically
from rewarm.request import Request

_MODE = 0o444
_NAME = "device-memory.so"


def provide(bundle_spec: Spec, wanted: Request, directory: str) -> str | None:
    """Put the library into the container directory of a container that starts cold, has a GPU and does not forbid it;
    the path. Raises OSError.

    None with several GPUs: peer access and CUDA IPC that the library does not see (NCCL has a runtime of its own) would
    miss what it serves. None in a user namespace: a mount of a file system with noexec could not be remounted there.
    """
    if wanted.device_memory == "off" or visible.count(bundle_spec) != 1 or spec.has_users(bundle_spec):
        return None
    try:
        with open(installation.device_memory(), "rb") as library:
            data = library.read()
    except FileNotFoundError:
        return None  # without it, device memory goes the driver's way
    path = file(directory)
    write_atomically(path, data, _MODE)
    return path


def bring_back(path: str, directory: str) -> None:
    """Put the library of a snapshot, a file at `path`, into the container directory of a restore. Raises OSError."""
    os.chmod(path, _MODE)
    os.rename(path, file(directory))


def file(directory: str) -> str:
    """Where the library is in a container directory: there for as long as the container is."""
    return os.path.join(directory, _NAME)


def of(bundle_spec: Spec) -> str:
    """The file behind a container's library, "" if it has none."""
    return spec.bind_source(bundle_spec, spec.LIBRARY_DESTINATION)
