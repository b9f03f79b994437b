"""Annotations and spec -> request, with every bad value refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm import policy, request
from rewarm.errors import RequestError
from rewarm.oci import pod
from rewarm.settings import Settings

SETTINGS = Settings()


def spec(**annotations: str) -> dict[str, Any]:
    return {"annotations": {f"rewarm.dev/{key.replace('_', '-')}": value for key, value in annotations.items()}}


def test_no_annotation_is_no_request() -> None:
    assert request.parse({}, SETTINGS) is None
    assert request.parse({"annotations": None}, SETTINGS) is None
    assert request.parse({"annotations": {"other.dev/snapshot": "x"}}, SETTINGS) is None


def test_presence_of_snapshot_is_the_opt_in() -> None:
    """Without it even a wrong key is none of rewarm's business: the container is runc's."""
    typed = spec(snapshott="x", capture="on-ready")
    assert request.parse(typed, SETTINGS) is None
    said = request.without_effect(typed, SETTINGS)
    assert len(said) == 2 and "rewarm.dev/snapshott" in said[1] and "no effect without rewarm.dev/snapshot" in said[1]
    assert request.without_effect(spec(snapshot="x", nonsense="y"), SETTINGS) == []


def test_defaults_and_all_keys() -> None:
    assert request.parse(spec(snapshot="llama-8b"), SETTINGS) == request.Request("llama-8b", "default")
    found = request.parse(
        {
            "annotations": {
                **spec(snapshot="a", capture="on-ready", ready="exec:true", on_miss="fail", device_memory="off")[
                    "annotations"
                ],
                "rewarm.dev/engine": "vllm",
                "io.kubernetes.cri.sandbox-namespace": "team-1",
            }
        },
        SETTINGS,
    )
    assert found == request.Request("a", "team-1", "on-ready", "exec:true", "fail", "off", "vllm")


def test_on_miss_comes_from_the_settings_when_the_pod_does_not_say() -> None:
    found = request.parse(spec(snapshot="a"), Settings(on_miss="fail"))
    assert found is not None and found.on_miss == "fail"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("capture", "always", "'always' is not one of never, on-ready"),
        ("on-miss", "", "'' is not one of cold-start, fail"),
        ("engine", "VLLM", "'VLLM' is not one of none, vllm, sglang"),
        ("device-memory", "on", "not one of auto, off"),
        ("ready", "http://:0/x", "is not one of file, http://:PORT/PATH, exec:CMD"),
        ("ready", "http://:65536/x", "is not one of"),
        ("ready", "http://example:80/x", "is not one of"),
        ("ready", "http://:80", "is not one of"),
        ("ready", "http://:80/a b", "is not one of"),
        ("ready", "http://:80/a\r\nHost: b", "is not one of"),
        ("ready", "exec:  ", "is not one of"),
        ("ready", "exec:" + "x" * 4092, "is longer than 4096 characters"),
        ("ready", "exec:tr\0ue", "has a NUL in it"),
        ("ready", "tcp:80", "is not one of"),
        ("snapshot", "", "is not a name"),
        ("snapshot", "a/b", "is not a name"),
        ("snapshot", "..", "is not a name"),
        ("snapshot", "../../etc", "is not a name"),
        ("snapshot", "a" * 300, "is not a name"),
        ("snapshot", "a\n", "is not a name"),
        ("container", "a b", "is not a name"),
        ("snapshto", "x", "no such key"),
        ("snapshot/x", "x", "no such key"),
        ("", "x", "no such key"),
    ],
)
def test_bad_values_are_named(key: str, value: str, said: str) -> None:
    annotations = {"rewarm.dev/snapshot": "good", f"rewarm.dev/{key}": value}
    with pytest.raises(RequestError) as caught:
        request.parse({"annotations": annotations}, SETTINGS)
    text = str(caught.value)
    assert said in text and f"rewarm.dev/{key}" in text


@given(st.text(max_size=20_000), st.text(max_size=20_000))
def test_the_message_is_one_short_printable_line(key: str, value: str) -> None:
    annotations = {"rewarm.dev/snapshot": "good", f"rewarm.dev/{key}": value}
    try:
        request.parse({"annotations": annotations}, SETTINGS)
    except RequestError as error:
        text = str(error)
        assert len(text) < 700 and re.fullmatch(r"[^\x00-\x1f\x7f]*", text)


def test_sandbox_and_other_containers_are_none_of_ours() -> None:
    sandbox = spec(snapshot="a")
    sandbox["annotations"]["io.kubernetes.cri.container-type"] = "sandbox"
    assert request.parse(sandbox, SETTINGS) is None
    other = spec(snapshot="a", container="server")
    other["annotations"]["io.kubernetes.cri.container-name"] = "sidecar"
    assert request.parse(other, SETTINGS) is None
    other["annotations"]["io.kubernetes.cri.container-name"] = "server"
    assert request.parse(other, SETTINGS) is not None


def test_a_pod_of_cri_o() -> None:
    names = {
        "io.kubernetes.pod.namespace": "team-1",
        "io.kubernetes.container.name": "server",
        "io.kubernetes.cri-o.ImageName": "ocr:1",
        "io.kubernetes.cri-o.ContainerType": "container",
    }
    made = spec(snapshot="a", container="server")
    made["annotations"].update(names)
    found = request.parse(made, SETTINGS)
    assert found is not None and found.namespace == "team-1"
    made["annotations"] |= {"io.kubernetes.cri.image-name": "other", "io.kubernetes.cri.container-name": "other"}
    assert pod.image(made) == "ocr:1" and pod.container(made) == "server", "what the pod has made up counts"
    made["annotations"]["rewarm.dev/container"] = "sidecar"
    assert request.parse(made, SETTINGS) is None
    made["annotations"] |= {"rewarm.dev/container": "server", "io.kubernetes.cri-o.ContainerType": "sandbox"}
    assert request.parse(made, SETTINGS) is None


@pytest.mark.parametrize(
    ("own", "kind", "other"),
    [
        ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri.container-type", "io.kubernetes.pod.namespace"),
        ("io.kubernetes.pod.namespace", "io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri.sandbox-namespace"),
    ],
)
def test_a_namespace_that_a_pod_has_made_up(own: str, kind: str, other: str) -> None:
    """An engine that lets all annotations through writes its own keys last, but not those of another engine."""
    made = spec(snapshot="a")
    made["annotations"] |= {own: "mine", kind: "container", other: "victim"}
    found = request.parse(made, SETTINGS)
    assert found is not None and found.namespace == "mine"
    kinds = ("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType")
    made["annotations"] |= dict.fromkeys(kinds, "container")
    with pytest.raises(RequestError, match="no engine writes both"):
        request.parse(made, SETTINGS)


def test_what_the_node_says_of_a_namespace() -> None:
    made = spec(snapshot="a", capture="on-ready", engine="vllm")
    made["annotations"]["io.kubernetes.cri.sandbox-namespace"] = "team-1"
    policies = policy.read(
        {"team-1": {"ignore": ["engine"], "pinned": {"capture": "never"}, "default": {"on-miss": "fail"}}}
    )
    found = request.parse(made, Settings(namespaces=policies))
    assert found == request.Request("a", "team-1", capture="never", on_miss="fail", engine="none")
    lines = request.without_effect(made, Settings(namespaces=policies))
    assert [line.split("'")[1] for line in lines] == ["rewarm.dev/capture", "rewarm.dev/engine"]
    assert all("the node's settings say otherwise for namespace team-1" in line for line in lines)
    nothing = Settings(namespaces=policy.read({"*": {"ignore": "all"}, "team-2": {}}))
    assert request.parse(made, nothing) is None and len(request.without_effect(made, nothing)) == 3
    made["annotations"]["io.kubernetes.cri.sandbox-namespace"] = "team-2"
    assert request.parse(made, nothing) is not None and request.without_effect(made, nothing) == []


@pytest.mark.parametrize("namespace", ["", "a/b", "..", "-x", "a" * 200])
def test_a_bad_namespace_is_refused(namespace: str) -> None:
    annotations = {"rewarm.dev/snapshot": "a", "io.kubernetes.cri.sandbox-namespace": namespace}
    with pytest.raises(RequestError, match="not a namespace"):
        request.parse({"annotations": annotations}, SETTINGS)


def container(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "annotations": {"rewarm.dev/snapshot": "auto", "io.kubernetes.cri.image-name": "ocr:1"},
        "process": {"args": ["serve"], "env": ["A=1", "B=2", "KUBERNETES_SERVICE_HOST=10.0.0.1"]},
        "mounts": [{"destination": "/models", "type": "bind", "source": "/x", "options": ["rbind"]}],
    }
    made.update(changes)
    return made


def name_of(made: dict[str, Any]) -> str:
    found = request.parse(made, SETTINGS)
    assert found is not None
    return found.snapshot


def test_auto_is_the_same_for_containers_that_one_snapshot_serves() -> None:
    name = name_of(container())
    assert re.fullmatch(r"auto-[0-9a-f]{20}", name)
    same = container(process={"args": ["serve"], "env": ["B=2", "A=1", "REDIS_SERVICE_HOST=10.0.0.9", "HOSTNAME=x"]})
    assert name_of(same) == name
    control = {"destination": "/run/rewarm", "type": "bind", "source": "/y", "options": ["bind"]}
    assert name_of(container(mounts=[*container()["mounts"], control])) == name


@pytest.mark.parametrize(
    "changes",
    [
        {"process": {"args": ["serve", "--other"], "env": ["A=1", "B=2"]}},
        {"process": {"args": ["serve"], "env": ["A=1"]}},
        {"process": {"args": ["serve"], "env": ["A=1", "B=another model"]}},
        {"mounts": []},
        {"annotations": {"rewarm.dev/snapshot": "auto", "io.kubernetes.cri.image-name": "ocr:2"}},
    ],
    ids=["args", "env", "value", "mounts", "image"],
)
def test_auto_differs_where_a_snapshot_would_not_fit(changes: dict[str, Any]) -> None:
    assert name_of(container(**changes)) != name_of(container())
