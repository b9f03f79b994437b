"""OCI images as tar archives in the OCI image layout, made from directories; `ctr images import` accepts them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support import rootfs

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def pack(
    target: Path,
    reference: str,
    layers: Sequence[Path],
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Path:
    """Writes an image named `reference` ("rewarm.test/ocr:1") of `layers` (lowest first, one blob each) to `target`.

    Blobs are uncompressed. A `target` whose stamp names the same layers and configuration is left alone. Returns
    `target`.
    """
    environment = [f"{key}={value}" for key, value in {**_ENVIRONMENT, **(env or {})}.items()]
    key = json.dumps([reference, [_identity(layer) for layer in layers], list(args), environment])
    stamp = target.with_name(f"{target.name}.stamp")
    if target.exists() and stamp.exists() and stamp.read_text() == key:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with tarfile.open(scratch, "w", format=tarfile.PAX_FORMAT) as out:
            blobs = [_add_layer(out, layer, scratch) for layer in layers]
            architecture = _ARCHITECTURES[platform.machine()]
            config = {
                "architecture": architecture,
                "os": "linux",
                "config": {"Env": environment, "Cmd": list(args)},
                "rootfs": {"type": "layers", "diff_ids": [blob["digest"] for blob in blobs]},
            }
            manifest = {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": _add_json(out, "application/vnd.oci.image.config.v1+json", config),
                "layers": blobs,
            }
            described = _add_json(out, manifest["mediaType"], manifest)
            described["platform"] = {"architecture": architecture, "os": "linux"}
            described["annotations"] = {"io.containerd.image.name": reference}
            index = {"schemaVersion": 2, "manifests": [described]}
            _add_bytes(out, "index.json", json.dumps(index).encode())
            _add_bytes(out, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        scratch.rename(target)
    finally:
        scratch.unlink(missing_ok=True)
    stamp.write_text(key)
    return target


def workload(name: str) -> tuple[Path, str]:
    """The image of a workload, or of Debian alone for "": its archive in the rootfs cache, and its reference.

    Raises rootfs.NotPrepared.
    """
    reference = f"rewarm.test/{name or 'base'}:1"
    target = rootfs.cache() / "images" / f"{name or 'base'}.tar"
    if not name:
        return pack(target, reference, rootfs.layers(), args=["sleep", "infinity"]), reference
    return pack(target, reference, rootfs.layers(name), args=rootfs.args(name), env=rootfs.env(name)), reference


_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


def _identity(layer: Path) -> str:
    """A layer's path and, where prepare.sh made it, its stamp. Layers of other directories are told by path alone."""
    stamp = layer.with_name(f".{layer.name}.stamp")
    built = stamp.read_text().strip() if stamp.exists() else ""
    return f"{layer} {built} {layer.stat().st_mtime_ns}"


def _add_layer(out: tarfile.TarFile, layer: Path, scratch: Path) -> dict[str, Any]:
    packed = scratch.with_name(f"{scratch.name}.layer")
    try:
        with tarfile.open(packed, "w", format=tarfile.PAX_FORMAT) as tar:
            for item in sorted(layer.iterdir()):
                tar.add(item, arcname=item.name)
        with packed.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = packed.stat().st_size
        out.add(packed, arcname=f"blobs/sha256/{digest}")
    finally:
        packed.unlink(missing_ok=True)
    return {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": f"sha256:{digest}", "size": size}


def _add_json(out: tarfile.TarFile, media_type: Any, value: Any) -> dict[str, Any]:
    data = json.dumps(value, sort_keys=True).encode()
    digest = hashlib.sha256(data).hexdigest()
    _add_bytes(out, f"blobs/sha256/{digest}", data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def _add_bytes(out: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    out.addfile(member, io.BytesIO(data))
