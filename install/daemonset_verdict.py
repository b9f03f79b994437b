"""What the two lists of `rewarm doctor` say of a node: whether a pod with the RuntimeClass can be started there.

`doctor` says whether containers can be captured and restored; `doctor --node` whether the kubelet's engine is
registered and runs with that. A kubelet has one engine, containerd or CRI-O, and the other one's files may lie there as
well (Docker brings a containerd without CRI). So one that runs with the runtime is enough, one that fails is too much.

Standard library only.
"""

from __future__ import annotations

import json
from typing import TypedDict

from daemonset_host import Problem

KUBELETS = ("containerd", "CRI-O")
OTHERS = ("Docker", "Podman", "engines")
"""No kubelet's; and doctor's remark that there is none of the four, which is said here of the two."""
STORE = "store"
"""That is another machine's as a rule: while it is gone pods start cold, and without the label nowhere."""
DISABLED = "CRI plugin is disabled"
"""What doctor says of a containerd that the kubelet cannot call: fine for `ctr`, useless here."""


class Check(TypedDict):
    name: str
    status: str
    found: str
    mend: str


def checks_of(command: str, status: int, said: str) -> list[Check]:
    """The checks of a `--json` answer. Raises Problem if it is none."""
    try:
        return [Check(name=c["name"], status=c["status"], found=c["found"], mend=c["mend"]) for c in _list(said)]
    except (ValueError, KeyError, TypeError):
        raise Problem(f"verify the node: {command} has no answer (exit status {status})") from None


def _list(said: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(said)["checks"]
    return found


def unwell(general: list[Check], node: list[Check]) -> list[str]:
    """What keeps pods away, a text for each thing; nothing if they can be started."""
    harmless = (*OTHERS, STORE)
    found = [_text(c) for c in (*general, *node) if c["status"] == "failed" and c["name"] not in harmless]
    kubelets = [c for c in node if c["name"] in KUBELETS]
    if not any(c["status"] == "ok" and DISABLED not in c["found"] for c in kubelets):
        found += [_text(c) for c in kubelets if c["status"] != "failed"]
        if not kubelets:
            found.append("neither containerd nor CRI-O is where rewarm looks (k3s and others have places of their own)")
    return list(dict.fromkeys(found))


def _text(check: Check) -> str:
    if DISABLED in check["found"]:
        step = (
            "if the kubelet is to use it, take `cri` out of disabled_plugins and restart it; cri-dockerd is not served"
        )
        return f"{check['name']}: {check['found']} ({step})"
    return f"{check['name']}: {check['found']} ({check['mend']})"
