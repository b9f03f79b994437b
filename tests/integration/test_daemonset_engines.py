"""The node's label, and what the kubelet's engine says: set only where a pod with the RuntimeClass can be started."""

from __future__ import annotations

from pathlib import Path

from daemonset_label import LABEL
from support import rootfs
from support.bare_node import BareNode
from support.daemonset import start
from support.kube_api import KubeApi
from support.node_image import NodeImage
from support.proc import command


def test_a_node_after_an_upgrade_of_containerd(
    nothing_left_behind: None, tmp_path: Path, image: NodeImage, api: KubeApi
) -> None:
    """2.x warns of each key that the file which 1.6 wrote has and it does not know."""
    with BareNode(tmp_path / "machine", rootfs.containerd2() / "containerd") as machine:
        machine.write("/etc/containerd/config.toml", command("/usr/bin/containerd", "config", "default").stdout)
        with start(image, machine, api) as pod:
            pod.wait_for("node-1: installed and verified")
        assert api.labels[LABEL] == "true"


def test_a_containerd_without_cri(image: NodeImage, machine: BareNode, api: KubeApi) -> None:
    """As Docker's package brings it, for nodes whose kubelet uses cri-dockerd."""
    machine.write("/etc/containerd/config.toml", 'disabled_plugins = ["cri"]\n')
    with start(image, machine, api) as pod:
        pod.wait_for("verify the node: containerd: its CRI plugin is disabled")
        assert "take `cri` out of disabled_plugins" in pod.log()
        assert LABEL not in api.labels and not pod.ready()
        machine.write("/etc/containerd/config.toml", "version = 2\n")
        pod.wait_for("node-1: installed and verified")
        assert api.labels[LABEL] == "true"


def test_a_containerd_that_systemd_does_not_run(image: NodeImage, machine: BareNode, api: KubeApi) -> None:
    """It is registered, but only its owner can restart it: the log says so, until that is done."""
    machine.run("mv", "/run/units/containerd", "/run/containerd.pid")
    with start(image, machine, api) as pod:
        pod.wait_for("containerd: not running under systemd; restart it yourself to make the change known")
        pod.wait_for("containerd was started before /etc/containerd/config.toml was changed (make it known: ")
        assert "or restart what else has started it" in pod.log()
        assert LABEL not in api.labels and not pod.ready()
        machine.run("mv", "/run/containerd.pid", "/run/units/containerd")
        machine.run("/usr/local/bin/systemctl", "restart", "containerd")
        pod.wait_for("node-1: installed and verified")
        assert api.labels[LABEL] == "true"


def test_a_containerd_that_has_ended(image: NodeImage, machine: BareNode, api: KubeApi) -> None:
    with start(image, machine, api) as pod:
        pod.wait_for("node-1: installed and verified")
        machine.run("sh", "-c", 'mv /run/units/containerd /run/pid && kill "$(cat /run/pid)"')
        pod.wait_for("containerd does not run with /etc/containerd/config.toml")
        pod.wait_until(lambda: LABEL not in api.labels, "the label removed")


def test_a_node_without_the_kubelets_engine(
    nothing_left_behind: None, tmp_path: Path, image: NodeImage, api: KubeApi
) -> None:
    with BareNode(tmp_path / "machine", "") as machine, start(image, machine, api) as pod:
        pod.wait_for("neither containerd nor CRI-O is where rewarm looks")
        assert LABEL not in api.labels and not pod.ready()


# Debian has no CRI-O. This one knows what it was started with, as the real one's `crio status config` does.
CRIO = """\
#!/bin/sh
case "$*" in
config) cat /etc/crio/crio.conf.d/* ;;
"status config") cat /run/crio/started ;;
"") mkdir -p /run/crio; cat /etc/crio/crio.conf.d/* >/run/crio/started; : >/run/crio/crio.sock; exec sleep infinity ;;
*) exit 1 ;;
esac
"""


def test_crio(nothing_left_behind: None, tmp_path: Path, image: NodeImage, api: KubeApi) -> None:
    """Registered, restarted and asked; without the restart there is no label. Uninstalled like any other."""
    with BareNode(tmp_path / "machine", "") as machine:
        machine.write("/usr/local/bin/crio", CRIO)
        machine.run("chmod", "+x", "/usr/local/bin/crio")
        runc = (
            '[crio.runtime]\ndefault_runtime = "runc"\n[crio.runtime.runtimes.runc]\nruntime_path = "/usr/sbin/runc"\n'
        )
        machine.write("/etc/crio/crio.conf.d/10-crio.conf", runc)
        machine.run("/usr/local/bin/systemctl", "start", "crio")
        before = machine.changed()
        machine.run("mv", "/run/units/crio", "/run/crio.pid")
        with start(image, machine, api) as pod:
            pod.wait_for("CRI-O: handler rewarm of /etc/crio/crio.conf.d/99-rewarm.conf is ")
            pod.wait_for("but crio was started without it (make it known: systemctl restart crio")
            assert LABEL not in api.labels and not pod.ready()
            machine.run("mv", "/run/crio.pid", "/run/units/crio")
            pod.wait_for("node-1: installed and verified")
            assert api.labels[LABEL] == "true"
        machine.run("/opt/rewarm/share/rewarm/uninstall.sh")
        assert machine.changed() == before
