"""What the kernel holds a container's processes to, beside its cgroup: CRIU takes it from the images, where it is the
source's, or what somebody has written there.

- The OOM score adjustment, by which the kernel chooses whom it kills (proc(5)): a replica of another class of service
  has another one. And CRIU does not write a 0 (criu/cr-restore.c: prepare_proc_misc), so that such processes have that
  of their parents: the engine's shim, which is to be killed last.
- Resource limits (prlimit(2)): no more than the live spec's, or, where that names none, than this process's own, which
  a container that starts cold inherits.
"""

from __future__ import annotations

import resource
from typing import Any

from rewarm import processes
from rewarm.errors import RestoreError
from rewarm.oci.spec import Spec

_TYPES = {
    f"RLIMIT_{name.removeprefix('RLIMIT_')}": getattr(resource, name) for name in dir(resource) if "RLIMIT_" in name
}
_INFINITY = (1 << 64) - 1


def limit(spec: Spec, init: int) -> list[str]:
    """Hold the restored, still stopped tree below `init` (a host pid) to the live spec's. A line for what the kernel
    does not let this process set. Raises RestoreError."""
    process: dict[str, Any] = spec.get("process") or {}
    tree = [pid for pid in processes.tree(init) if processes.start_time(pid) is not None]
    try:
        _limit_resources(_allowed(process.get("rlimits") or []), tree)
    except OSError as error:
        raise RestoreError("limit resources of", f"process {init}", error.strerror or str(error)) from error
    wanted = process.get("oomScoreAdj")
    # Without one a cold start inherits this process's.
    return _set_scores(_score("self") if wanted is None else int(wanted), tree, exactly=wanted is not None)


def _allowed(entries: list[dict[str, Any]]) -> dict[int, int]:
    """The hard limit of each type, -1 for none."""
    allowed = {number: resource.getrlimit(number)[1] for number in _TYPES.values()}
    for entry in entries:
        number, hard = _TYPES.get(str(entry.get("type"))), int(entry.get("hard", 0))
        if number is not None:
            allowed[number] = -1 if hard >= _INFINITY else hard
    return allowed


def _limit_resources(allowed: dict[int, int], tree: list[int]) -> None:
    for pid in tree:
        for number, most in allowed.items():
            soft, hard = resource.prlimit(pid, number)
            if most != resource.RLIM_INFINITY and (hard > most or hard == resource.RLIM_INFINITY):
                resource.prlimit(pid, number, (most if soft == resource.RLIM_INFINITY else min(soft, most), most))


def _set_scores(wanted: int, tree: list[int], *, exactly: bool) -> list[str]:
    """No score is below `wanted`. With `exactly` that is the init's, whose own was that of its spec; whoever below it
    has made itself likelier to be killed stays so."""
    was = {pid: _score(pid) for pid in tree}
    for pid, score in was.items():
        if score < wanted or (exactly and score != wanted and score == was[tree[0]]):
            try:
                with open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
                    file.write(str(wanted))
            except PermissionError:
                # Below what a process with CAP_SYS_RESOURCE has set. Without it a cold start would have failed.
                return [
                    f"process {processes.namespace_pid(pid)} has the OOM score {score}, not the {wanted} of its spec"
                ]
            except OSError as error:
                raise RestoreError("set OOM score of", f"process {pid}", error.strerror or str(error)) from error
    return []


def _score(pid: int | str) -> int:
    with open(f"/proc/{pid}/oom_score_adj", encoding="ascii") as file:
        return int(file.read())
