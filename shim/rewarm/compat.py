"""Snapshot x node -> fits, or the reason why not.

Both sides are described by the same `Requires`: what a snapshot's source had is compared with what this
container and this node have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rewarm import node
from rewarm.errors import Unfit
from rewarm.gpu.container import ContainerGpus
from rewarm.oci import pod
from rewarm.oci.spec import OWN_DESTINATIONS, digest, mounts, without_io_uring
from rewarm.request import environment_keys
from rewarm.settings import Settings
from rewarm.store.manifest import GpuDevice, Mount, Requires
from rewarm_hooks import gpu_pairs

_NO_GPUS = ContainerGpus()
_MAPS = (580, 0, 0)
"""The first driver that restores to other GPUs (cuda.h 13.0: CUcheckpointRestoreArgs.gpuPairs)."""

# Flags of /proc/cpuinfo that the kernel or the hypervisor adds and that no program's instructions depend on.
_SOFT_FLAGS = frozenset(
    """
    acpi amd_lbr_pmc_freeze amd_lbr_v2 amd_ppin aperfmperf arat arch_capabilities arch_perfmon avic bpext bts
    bus_lock_detect cat_l2 cat_l3 cdp_l2 cdp_l3 constant_tsc cpb cpuid cpuid_fault cqm cqm_llc cqm_mbm_local
    cqm_mbm_total cqm_occup_llc cr8_legacy debug_swap decodeassists ds_cpl dtes64 dtherm dts ept ept_ad est extapic
    extd_apicid flexpriority flush_l1d flushbyasid fsrm ht hw_pstate hwp hwp_act_window hwp_epp hwp_notify
    hwp_pkg_req hypervisor ibpb ibrs ibrs_enhanced ibs ida intel_ppin invpcid invpcid_single irperf lbrv mba
    md_clear monitor mwaitx nonstop_tsc nonstop_tsc_s3 nopl npt nrip_save ospke overflow_recov pausefilter pbe
    pconfig pebs perfctr_core perfctr_llc perfctr_nb pfthreshold pln pti pts rdt_a rep_good sev sev_es skinit smca
    sme smx split_lock_detect ssbd stibp succor svm svm_lock tm tm2 tme topoext tpr_shadow tsc_deadline_timer
    tsc_known_freq tsc_reliable tsc_scale user_shstk v_spec_ctrl v_vmsave_vmload vgif vmcb_clean vmmcall vmx vnmi
    vpid wdt xsaveerptr xtopology
    """.split()  # noqa: SIM905
)


def describe(
    spec: dict[str, Any],
    runc_version: str,
    criu_version: str,
    settings: Settings,
    gpus: ContainerGpus = _NO_GPUS,
) -> Requires:
    """What a container with this spec, on this node, has: the source's at a capture, the target's at a restore."""
    process = spec.get("process") or {}
    linux = spec.get("linux") or {}
    user = process.get("user") or {}
    return Requires(
        arch=node.architecture(),
        cpu_features=tuple(f for f in node.cpu_features() if f not in _SOFT_FLAGS),
        kernel=node.kernel(),
        criu=criu_version,
        runc=runc_version,
        image=pod.image(spec),
        args=tuple(map(str, process.get("args") or [])),
        env_keys=environment_keys(spec, settings),
        mounts=tuple(Mount(destination, kind) for destination, kind in mounts(spec)),
        user=(int(user.get("uid", 0)), int(user.get("gid", 0))),
        capabilities=tuple(sorted((process.get("capabilities") or {}).get("bounding") or [])),
        # What rewarm itself adds to every capturable container must not tell two containers apart.
        seccomp=digest(without_io_uring(linux.get("seccomp"))),
        lsm=str(process.get("apparmorProfile") or process.get("selinuxLabel") or ""),
        namespaces=tuple(sorted(map(_namespace, linux.get("namespaces") or []))),
        gpus=gpu_devices(gpus),
        driver=gpus.driver,
        cgroup_version=node.cgroup_version(),
    )


def _namespace(namespace: dict[str, Any]) -> str:
    """Its type. A pid namespace is another thing where it is shared: the init of one's own has number 1, in a pod's it
    has not."""
    kind = str(namespace.get("type"))
    return "pid (shared)" if kind == "pid" and namespace.get("path") else kind


def gpu_devices(gpus: ContainerGpus) -> tuple[GpuDevice, ...]:
    """The GPUs as a manifest describes them."""
    return tuple(GpuDevice(*device.gpu, device.compute_mode) for device in gpus.devices)


def check(snapshot: Requires, here: Requires) -> None:
    """Unfit, with both values, at the first difference that matters; returns when the snapshot fits."""
    _equal("architecture", snapshot.arch, here.arch)
    missing = sorted(set(snapshot.cpu_features) - set(here.cpu_features))
    if missing:
        raise _unfit(
            f"snapshot needs the CPU feature{'s' * (len(missing) > 1)} {', '.join(missing[:8])}, "
            "this node's CPU has not"
        )
    _not_older("kernel", snapshot.kernel, here.kernel, parts=2)
    _not_older("CRIU", snapshot.criu, here.criu, parts=3)
    if snapshot.cgroup_version != here.cgroup_version:
        raise _unfit(
            f"snapshot is of a node with cgroup v{snapshot.cgroup_version}, this node has v{here.cgroup_version}"
        )
    # An engine that names no image (plain runc) leaves the arguments and mounts to tell containers apart.
    if snapshot.image and here.image:
        _equal("image", snapshot.image, here.image)
    _equal("arguments", list(snapshot.args), list(here.args))
    _same_keys(snapshot.env_keys, here.env_keys)
    _same_mounts(snapshot.mounts, here.mounts)
    _equal("user", "{}:{}".format(*snapshot.user), "{}:{}".format(*here.user))
    _equal("namespaces", sorted(snapshot.namespaces), sorted(here.namespaces))
    extra = sorted(set(snapshot.capabilities) - set(here.capabilities))
    if extra:
        raise _unfit(f"snapshot was taken with capability {extra[0]}, this container has it not")
    if snapshot.seccomp != here.seccomp:
        raise _unfit(
            "snapshot was taken under another seccomp profile than this container's "
            f"({snapshot.seccomp[:8] or 'none'}, here {here.seccomp[:8] or 'none'})"
        )
    _equal("LSM label", snapshot.lsm or "none", here.lsm or "none")
    if snapshot.gpus or here.gpus:
        _same_gpus(snapshot, here)


def check_image(snapshot: Requires, image_id: Callable[[], str]) -> None:
    """Unfit if the container is of another image than the snapshot, by what `image.identity` tells of both.

    It comes last and is asked only for a snapshot that has one: it may walk the image's layers.
    """
    there = snapshot.image_id
    here = image_id() if there else ""
    # Two engines tell it in different ways: nothing can be said then.
    if here and there != here and there.partition(":")[0] == here.partition(":")[0]:
        cause = f"snapshot was taken of another image of that name ({_brief(there)}, here {_brief(here)})"
        raise Unfit("fit snapshot", "to this container", cause, "capture it again")


def _brief(image_id: str) -> str:
    return image_id.partition(":")[2][:12]


def _same_gpus(snapshot: Requires, here: Requires) -> None:
    """The driver puts device memory back only where it came from, or on a GPU of the same kind."""
    try:
        pairs = gpu_pairs.pair([device.gpu for device in snapshot.gpus], [device.gpu for device in here.gpus])
    except gpu_pairs.CannotPair as error:
        raise _unfit(str(error)) from None
    if snapshot.driver != here.driver:
        raise _unfit(f"snapshot was taken with NVIDIA driver {snapshot.driver}, this node has {here.driver or 'none'}")
    modes = {device.uuid: device.compute_mode for device in here.gpus}
    for device, (_, target) in zip(snapshot.gpus, pairs, strict=True):
        if device.compute_mode != modes[target.uuid]:
            raise _unfit(
                f"snapshot was taken with a GPU in compute mode {device.compute_mode}, "
                f"{target.uuid} here is in {modes[target.uuid]}"
            )
    if gpu_pairs.device_map(pairs) and node.version_tuple(here.driver) < _MAPS:
        raise _unfit(f"snapshot is of other GPUs, for which driver 580 or newer is needed, this node has {here.driver}")


def _unfit(cause: str) -> Unfit:
    return Unfit("fit snapshot", "to this container", cause)


def _equal(what: str, snapshot: object, here: object) -> None:
    if snapshot != here:
        raise _unfit(f"snapshot has {what} {_short(snapshot)}, this container has {_short(here)}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "…"


def _not_older(what: str, snapshot: str, here: str, parts: int) -> None:
    """CRIU reads images of older versions and kernels, not of newer ones."""
    if node.version_tuple(here)[:parts] < node.version_tuple(snapshot)[:parts]:
        raise _unfit(f"snapshot was taken with {what} {snapshot}, this node has the older {here or 'none'}")


def _same_keys(snapshot: tuple[str, ...], here: tuple[str, ...]) -> None:
    only_there, only_here = sorted(set(snapshot) - set(here)), sorted(set(here) - set(snapshot))
    if only_there:
        raise _unfit(
            f"snapshot was taken with environment variable {only_there[0]}, this container has none of that name"
        )
    if only_here:
        raise _unfit(f"this container has environment variable {only_here[0]}, the snapshot was taken without it")


def _same_mounts(snapshot: tuple[Mount, ...], here: tuple[Mount, ...]) -> None:
    there = {m.destination: m.type for m in snapshot if m.destination not in OWN_DESTINATIONS}
    own = {m.destination: m.type for m in here if m.destination not in OWN_DESTINATIONS}
    for destination, kind in sorted(there.items()):
        if destination not in own:
            raise _unfit(f"snapshot has a mount at {destination}, this container has none")
        if own[destination] != kind:
            raise _unfit(
                f"snapshot has a mount of type {kind} at {destination}, this container one of {own[destination]}"
            )
    for destination in sorted(own):
        if destination not in there:
            raise _unfit(f"this container has a mount at {destination}, the snapshot has none")
