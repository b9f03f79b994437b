"""config/kubernetes: what kustomize makes of it, against Kubernetes' schemas, against itself, and against rewarm."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import daemonset
import engine
from daemonset_host import STOP_SECONDS
from daemonset_label import LABEL
from rewarm import annotation, request, settings
from support import manifests
from support.manifests import DIRECTORY, Admission, Object

# ValidatingAdmissionPolicy, the node in a pod's token and appArmorProfile are there since 1.30.
SUPPORTED = sorted(
    {version for version in kubernetes_validate.utils.all_versions() if int(version.split(".")[1]) >= 30},
    key=lambda version: int(version.split(".")[1]),
)
TARGETS = ["base", "example", *sorted(f"overlays/{path.name}" for path in (DIRECTORY / "overlays").iterdir())]
CLUSTER_WIDE = {
    "ClusterRole",
    "ClusterRoleBinding",
    "Namespace",
    "PersistentVolume",
    "RuntimeClass",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}


def pods(objects: list[Object]) -> list[Object]:
    """The objects with a pod template."""
    return [item for item in objects if "template" in item.get("spec", {})]


@pytest.mark.parametrize("version", SUPPORTED)
@pytest.mark.parametrize("target", TARGETS)
def test_kubernetes_takes_it(target: str, version: str) -> None:
    for item in manifests.build(target):
        manifests.validate(item, version)


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("DaemonSet", "rewarm-node", ("spec", "template", "spec", "hostPid"), True),
        ("DaemonSet", "rewarm-node", ("spec", "template", "spec", "containers", 0, "securityContext", "plus"), []),
        ("RuntimeClass", "rewarm", ("scheduling", "nodeSelector"), ["rewarm.dev/installed"]),
        ("ValidatingAdmissionPolicy", "rewarm-node", ("spec", "failPolicy"), "Fail"),
        ("NetworkPolicy", "rewarm-store", ("spec", "ingress", 0, "form"), []),
    ],
)
def test_a_mistake_would_be_seen(kind: str, name: str, path: tuple[str | int, ...], value: object) -> None:
    item = copy.deepcopy(manifests.pick(manifests.build("base"), kind, name))
    place: Any = item
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        manifests.validate(item, SUPPORTED[-1])


def test_the_overlay_of_the_documentation(tmp_path: Path) -> None:
    """docs/kubernetes.md shows one for people to copy, and has them add the component that uninstalls."""
    text = (DIRECTORY.parents[1] / "docs/kubernetes.md").read_text()
    (overlay,) = re.findall(r"```yaml\n(apiVersion: kustomize.*?)```", text, re.DOTALL)
    shutil.copytree(DIRECTORY, tmp_path / "kubernetes")
    for name, more in (("own", ""), ("away", ", ../../components/uninstall")):
        own = tmp_path / "kubernetes/overlays" / name
        own.mkdir()
        (own / "kustomization.yaml").write_text(overlay.replace("components/gpu]", f"components/gpu{more}]"))
        objects = manifests.build(own)
        assert manifests.pick(objects, "PersistentVolume", "rewarm-store")["spec"]["nfs"]["server"] == "YOURS"
        (container,) = manifests.pick(objects, "DaemonSet", "rewarm-node")["spec"]["template"]["spec"]["containers"]
        assert container["image"] == "YOURS:1"
        assert ("--uninstall" in container["args"]) == bool(more)


@pytest.mark.parametrize("target", TARGETS)
def test_namespaces(target: str) -> None:
    """kustomize's own `namespace` puts one on kinds that have none, if it is older than they are."""
    objects = manifests.build(target)
    there = {item["metadata"]["name"] for item in objects if item["kind"] == "Namespace"}
    for item in objects:
        assert (item["kind"] in CLUSTER_WIDE) == ("namespace" not in item["metadata"]), item["metadata"]
        assert item["metadata"].get("namespace") in {None, *there}


@pytest.mark.parametrize("target", TARGETS)
def test_selectors_select(target: str) -> None:
    objects = manifests.build(target)
    labels = [item["spec"]["template"]["metadata"]["labels"] for item in pods(objects)]

    def selected(selector: dict[str, str]) -> bool:
        return any(selector.items() <= each.items() for each in labels)

    for item in pods(objects):
        wanted = item["spec"]["selector"]["matchLabels"]
        assert wanted and wanted.items() <= item["spec"]["template"]["metadata"]["labels"].items()
    for item in objects:
        kind, spec = item["kind"], item.get("spec", {})
        if kind == "Service":
            assert selected(spec["selector"])
        elif kind == "PodDisruptionBudget":
            assert selected(spec["selector"]["matchLabels"])
        elif kind == "NetworkPolicy":
            if item["metadata"]["name"] != "rewarm-store":  # whose pods are the user's
                assert selected(spec["podSelector"]["matchLabels"])
            for rule in spec["ingress"]:
                assert all(
                    selected(peer["podSelector"]["matchLabels"]) for peer in rule["from"] if "ipBlock" not in peer
                )


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_named_is_there(target: str) -> None:
    objects = manifests.build(target)
    there = {(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects}
    for item in pods(objects):
        space, pod = item["metadata"]["namespace"], item["spec"]["template"]["spec"]
        if "serviceAccountName" in pod:
            assert ("ServiceAccount", space, pod["serviceAccountName"]) in there
        if "runtimeClassName" in pod:
            base = manifests.build("base")
            assert manifests.pick(base, "RuntimeClass", pod["runtimeClassName"])
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                name = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", space, name) in there
            if "configMap" in volume and not volume["configMap"].get("optional"):
                assert ("ConfigMap", space, volume["configMap"]["name"]) in there
        for container in pod["containers"]:
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted == set(volumes), "a volume without a mount, or the other way round"
            ports = {port["name"] for port in container.get("ports", [])}
            probes = [container[key] for key in container if key.endswith("Probe")]
            assert all(probe["httpGet"]["port"] in ports for probe in probes if "httpGet" in probe)
            assert ":" in container["image"] and container["image"].startswith("registry.example/")
    for item in objects:
        for subject in item.get("subjects", []):
            assert (subject["kind"], subject["namespace"], subject["name"]) in there
        if "roleRef" in item:
            assert (item["roleRef"]["kind"], None, item["roleRef"]["name"]) in there
        if item["kind"] == "ValidatingAdmissionPolicyBinding":
            assert ("ValidatingAdmissionPolicy", None, item["spec"]["policyName"]) in there
        if item["kind"] == "PersistentVolume":
            claim = item["spec"]["claimRef"]
            (bound,) = (each for each in objects if each["kind"] == "PersistentVolumeClaim")
            assert ("PersistentVolumeClaim", claim["namespace"], claim["name"]) in there
            assert bound["spec"]["volumeName"] == item["metadata"]["name"]
            assert bound["spec"]["storageClassName"] == item["spec"]["storageClassName"]


def test_the_runtime_class_is_what_the_installer_registers() -> None:
    runtime = manifests.pick(manifests.build("base"), "RuntimeClass", "rewarm")
    assert runtime["handler"] == engine.RUNTIME
    assert runtime["scheduling"]["nodeSelector"] == {LABEL: "true"}
    assert "overhead" not in runtime


def test_the_examples_annotations() -> None:
    for item in pods(manifests.build("example")):
        annotations = item["spec"]["template"]["metadata"]["annotations"]
        spec = {
            "annotations": {**annotations, "io.kubernetes.cri.sandbox-namespace": item["metadata"]["namespace"]},
            "process": {"args": ["serve"], "env": ["PATH=/bin"]},
        }
        found = request.parse(spec, settings.Settings())
        assert found is not None
        assert found.capture == "on-ready"
        port, path = annotation.http_target(found.ready)
        (container,) = item["spec"]["template"]["spec"]["containers"]
        assert container["readinessProbe"]["httpGet"]["path"] == path
        assert [each["containerPort"] for each in container["ports"]] == [port]


@pytest.mark.parametrize("target", TARGETS)
def test_settings(target: str, tmp_path: Path) -> None:
    """rewarm takes them; a store is where the DaemonSet mounts it."""
    objects = manifests.build(target)
    found = [item for item in objects if item["kind"] == "ConfigMap"]
    assert bool(found) == (target in ("overlays/claim", "overlays/nfs"))
    for item in found:
        file = tmp_path / "config.yaml"
        file.write_text(item["data"]["config.yaml"])
        file.chmod(0o644)
        loaded = settings.load(file)
        pod = manifests.pick(objects, "DaemonSet", "rewarm-node")["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        given = options(container["args"])
        assert loaded.store == given.store_on_node
        assert str(given.store) in [mount["mountPath"] for mount in container["volumeMounts"]]
        (volume,) = (each for each in pod["volumes"] if each["name"] == "settings")
        assert volume["configMap"]["name"] == item["metadata"]["name"]
        (mount,) = (each for each in container["volumeMounts"] if each["name"] == "settings")
        assert given.settings == Path(mount["mountPath"]) / "config.yaml"


def options(args: list[str]) -> Any:
    return daemonset.arguments(args)


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "example"])
def test_the_daemonsets_options(target: str) -> None:
    pod = manifests.pick(manifests.build(target), "DaemonSet", "rewarm-node")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = options(container["args"])
    assert given.uninstall == (target == "overlays/uninstall")
    assert str(given.ready.parent) in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert container["readinessProbe"]["exec"]["command"][-1] == str(given.ready)
    assert pod["terminationGracePeriodSeconds"] > 2 * STOP_SECONDS
    assert pod["hostPID"] and not pod.get("hostNetwork")
    assert not any("hostPath" in volume for volume in pod["volumes"])
    # A privileged container that may not gain privileges is refused by the API server, which no schema says.
    security = container["securityContext"]
    assert (security["privileged"], security.get("allowPrivilegeEscalation")) == (
        (True, None) if target == "overlays/gpu" else (False, False)
    )


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "example"])
def test_one_node_at_a_time(target: str) -> None:
    """A version that breaks nodes breaks one; all of them at once is for what takes rewarm away."""
    spec = manifests.pick(manifests.build(target), "DaemonSet", "rewarm-node")["spec"]
    unavailable = "100%" if target == "overlays/uninstall" else 1
    assert spec["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": unavailable}}
    (container,) = spec["template"]["spec"]["containers"]
    # A node that loses its verdict at once is not gone past.
    assert spec["minReadySeconds"] >= container["readinessProbe"]["periodSeconds"]


def test_the_example_is_not_drained_empty() -> None:
    objects = manifests.build("example")
    deployment = manifests.pick(objects, "Deployment", "model-server")
    budget = manifests.pick(objects, "PodDisruptionBudget", "model-server")
    assert budget["metadata"]["namespace"] == deployment["metadata"]["namespace"]
    assert budget["spec"]["minAvailable"] == 1 < deployment["spec"]["replicas"], "or no node can be drained"
    assert budget["spec"]["selector"] == deployment["spec"]["selector"]


def test_gpu_nodes() -> None:
    objects = manifests.build("overlays/gpu")
    pod = manifests.pick(objects, "DaemonSet", "rewarm-node")["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["nvidia.com/gpu.present"] == "true"
    runtime = manifests.pick(objects, "RuntimeClass", "rewarm")
    for tolerations in (pod["tolerations"], runtime["scheduling"]["tolerations"]):
        assert "nvidia.com/gpu" in [each["key"] for each in tolerations]


def test_a_store_in_the_cluster(tmp_path: Path) -> None:
    """A component that no overlay here has, since its networks are the user's."""
    copied = tmp_path / "kubernetes"
    shutil.copytree(DIRECTORY, copied)
    overlay = copied / "overlays/own"
    overlay.mkdir()
    overlay.joinpath("kustomization.yaml").write_text(
        "resources: [../../base]\ncomponents: [../../components/store-in-cluster]\n"
    )
    peers = []
    for directory in (DIRECTORY / "base", overlay):
        policy = manifests.pick(manifests.build(directory), "NetworkPolicy", "rewarm-store")
        manifests.validate(policy, SUPPORTED[-1])
        peers.append([list(peer) for peer in policy["spec"]["ingress"][0]["from"]])
    assert peers == [[["podSelector"]], [["podSelector"], ["ipBlock"]]]


def test_the_example_is_restricted() -> None:
    """As its namespace enforces; the names are those of the Pod Security Standards."""
    objects = manifests.build("example")
    labels = manifests.pick(objects, "Namespace", "models")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = manifests.pick(objects, "Deployment", "model-server")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not any(key in pod for key in ("hostPID", "hostNetwork", "hostIPC"))
    assert all(set(volume) - {"name"} <= {"emptyDir", "configMap", "secret", "projected"} for volume in pod["volumes"])
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_account_may_do_one_thing() -> None:
    objects = manifests.build("base")
    assert [item["kind"] for item in objects if item["kind"] in ("Role", "RoleBinding")] == []
    assert manifests.pick(objects, "ClusterRole", "rewarm-node")["rules"] == [
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["patch"]}
    ]
    assert manifests.pick(objects, "ServiceAccount", "rewarm-node")["automountServiceAccountToken"] is False


NODE: Object = {
    "metadata": {
        "name": "node-1",
        "labels": {"kubernetes.io/hostname": "node-1", "pool": "a"},
        "annotations": {"a": "b"},
    },
    "spec": {"podCIDR": "192.0.2.0/24"},
}


def sent(operation: str = "UPDATE", name: str = "node-1", on: str | None = "node-1", who: str | None = None) -> Object:
    user = who or "system:serviceaccount:rewarm:rewarm-node"
    extra = {} if on is None else {"authentication.kubernetes.io/node-name": [on]}
    return {"operation": operation, "name": name, "userInfo": {"username": user, "extra": extra}}


def changed(**metadata: Any) -> Object:
    node = copy.deepcopy(NODE)
    node["metadata"].update(metadata)
    return node


LABELS = NODE["metadata"]["labels"]


@pytest.mark.parametrize(
    ("message", "request_", "before", "after"),
    [
        (None, sent(), NODE, changed(labels={**LABELS, LABEL: "true"})),
        (None, sent(), changed(labels={**LABELS, LABEL: "true"}), NODE),
        (None, sent(), changed(labels={**LABELS, LABEL: "something"}), changed(labels={**LABELS, LABEL: "true"})),
        (None, sent(), NODE, NODE),
        # Others' business.
        (None, sent(who="system:node:node-1", on=None), NODE, changed(labels={})),
        ("only the node that its pod runs on", sent(on="node-2"), NODE, changed(labels={**LABELS, LABEL: "true"})),
        ("only the node that its pod runs on", sent(on=None), NODE, changed(labels={**LABELS, LABEL: "true"})),
        ("is true, or not there", sent(), NODE, changed(labels={**LABELS, LABEL: "false"})),
        ("no label but", sent(), NODE, changed(labels={**LABELS, "pool": "b"})),
        ("no label but", sent(), NODE, changed(labels={**LABELS, "node-role.kubernetes.io/control-plane": ""})),
        ("no label but", sent(), NODE, changed(labels={"pool": "a"})),
        ("labels only", sent(), NODE, changed(annotations={"a": "c"})),
        ("labels only", sent(), NODE, changed(annotations={})),
        ("labels only", sent(), NODE, changed(finalizers=["x"])),
        ("labels only", sent(), NODE, changed(ownerReferences=[{"uid": "x"}])),
        ("labels only", sent(), NODE, {**NODE, "spec": {**NODE["spec"], "unschedulable": True}}),
        ("labels only", sent(), NODE, {**NODE, "spec": {**NODE["spec"], "taints": [{"key": "x"}]}}),
        ("not create or delete", sent("CREATE"), None, NODE),
        ("not create or delete", sent("DELETE"), NODE, None),
        ("no subresource", {**sent(), "subResource": "status"}, NODE, NODE),
    ],
)
def test_admission(message: str | None, request_: Object, before: Object | None, after: Object | None) -> None:
    policy = Admission(manifests.pick(manifests.build("base"), "ValidatingAdmissionPolicy", "rewarm-node"))
    refusal = policy.refusal(request_, before, after)
    assert refusal is None if message is None else message in (refusal or "admitted")


def test_admission_of_a_user_without_extra() -> None:
    policy = Admission(manifests.pick(manifests.build("base"), "ValidatingAdmissionPolicy", "rewarm-node"))
    request_ = sent()
    del request_["userInfo"]["extra"]
    assert "only the node" in str(policy.refusal(request_, NODE, changed(labels={**LABELS, LABEL: "true"})))


def test_admission_names_what_the_manifests_name() -> None:
    objects = manifests.build("base")
    policy = manifests.pick(objects, "ValidatingAdmissionPolicy", "rewarm-node")
    account = manifests.pick(objects, "ServiceAccount", "rewarm-node")["metadata"]
    who = f"system:serviceaccount:{account['namespace']}:{account['name']}"
    assert who in policy["spec"]["matchConditions"][0]["expression"]
    names = set(re.findall(r"rewarm\.dev/[a-z-]+", yaml.dump(policy)))
    assert names == {LABEL}
