"""config/kubernetes as kustomize makes it, and what an API server would say about it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import cel
import kubernetes_validate
import yaml

from support import rootfs
from support.proc import command

DIRECTORY = Path(__file__).parents[2] / "config/kubernetes"
Object = dict[str, Any]


@functools.cache
def _text(directory: Path) -> str:
    return command(rootfs.kustomize(), "build", directory).stdout


def build(name: str | Path) -> list[Object]:
    """The objects of `kustomize build`, of a directory below config/kubernetes or of any other."""
    return list(yaml.safe_load_all(_text(DIRECTORY / name)))


def pick(objects: list[Object], kind: str, name: str) -> Object:
    """The one object of that kind and name."""
    (found,) = (item for item in objects if item["kind"] == kind and item["metadata"]["name"] == name)
    return found


def validate(item: Object, version: str) -> None:
    """Raises kubernetes_validate.ValidationError if it is not what that Kubernetes takes, unknown fields included."""
    kubernetes_validate.validate(item, version, strict=True)


class Admission:
    """A ValidatingAdmissionPolicy. Variables are made in their order, as the API server does when they are used."""

    def __init__(self, policy: Object) -> None:
        spec = policy["spec"]
        self.conditions = [item["expression"] for item in spec["matchConditions"]]
        self.variables = [(item["name"], item["expression"]) for item in spec["variables"]]
        self.validations = [(item["expression"], item["message"]) for item in spec["validations"]]

    def refusal(self, request: Object, before: Object | None, after: Object | None) -> str | None:
        """The message of the first validation that does not hold, or whose evaluation fails; None if admitted."""
        names = {"request": request, "oldObject": before, "object": after}
        if not all(cel.evaluate(expression, names) for expression in self.conditions):
            return None
        variables: dict[str, Any] = {}
        for name, expression in self.variables:
            try:
                variables[name] = cel.evaluate(expression, {**names, "variables": variables})
            except Exception:  # the server evaluates those that are used only; a use of it then fails
                continue
        for expression, message in self.validations:
            try:
                holds = cel.evaluate(expression, {**names, "variables": variables})
            except Exception as error:
                return f"{message} ({error})"
            if not holds:
                return str(message)
        return None
