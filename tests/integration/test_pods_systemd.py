"""Pods on a node as most are: systemd, which makes the cgroups, one cgroup v2 tree with a private namespace of it for
each container, a kernel of the distribution's, and root with all its capabilities (another user's processes can be
captured by no less). A virtual machine, since the machine of the tests has none of that; what is tried is test_pods.py.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from support import guest, image, rootfs
from support.pods import SYSTEMD, pause_image

REPOSITORY = Path(__file__).parents[2]
_TIMEOUT = 1500
# Whichever test is the first (or the only one, by -k or --lf) waits for the guest.
pytestmark = [pytest.mark.timeout(_TIMEOUT + 60), pytest.mark.alone]
TESTS = [
    "test_sandbox_and_container",
    "test_a_restart_after_a_crash_is_warm",
    "test_the_end_of_memory_is_reported",
    "test_a_restricted_container",
    "test_its_sockets_are_on_the_new_address",
    "test_its_connections",
    "test_its_limits_are_its_own",
    "test_its_cgroup",
    "test_its_class_of_service_is_its_own",
    "test_a_shared_pid_namespace",
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Path:
    """What the guest has left when it had run the tests: `results.xml` and `facts`."""
    # In the guest there is no compiler's time to spare.
    pause_image()
    image.workload("pod_server")
    directory = tmp_path_factory.mktemp("guest") / "shared"
    names = [f"tests/integration/test_pods.py::{name}[1.6]" for name in TESTS]
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--timeout={_TIMEOUT // 2}"]
    words += ["--junitxml=/guest/results.xml", *names]
    variables = {
        "HOME": "/root",
        "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "REWARM_TEST_PREFIX": str(prefix),
        "REWARM_TEST_ROOTFS": str(rootfs.cache()),
        "TMPDIR": "/guest-tmp",
        SYSTEMD: "1",
    }
    script = [f"cd {shlex.quote(str(REPOSITORY))} || exit"]
    script += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    script += ["(uname -r; stat -fc %T /sys/fs/cgroup; cat /proc/1/comm; grep CapEff /proc/self/status) >/guest/facts"]
    script += [shlex.join(words)]
    said = guest.run(directory, "\n".join(script), timeout=_TIMEOUT)
    assert (directory / "results.xml").exists(), said
    return directory


@pytest.mark.parametrize("name", TESTS)
def test_pod(shared: Path, name: str) -> None:
    cases = {case.get("name"): case for case in ElementTree.parse(shared / "results.xml").iter("testcase")}
    case = cases[f"{name}[1.6]"]
    wrong = [one for kind in ("failure", "error", "skipped") for one in case.iter(kind)]
    assert not wrong, "\n".join(f"{one.get('message')}\n{one.text}" for one in wrong)


def test_the_guest_is_another_machine(shared: Path) -> None:
    """Else the other tests would say nothing that test_pods.py does not."""
    release, *facts = (shared / "facts").read_text().splitlines()
    assert release != os.uname().release
    assert facts == ["cgroup2fs", "systemd", "CapEff:\t000001ffffffffff"]
