"""The Container Runtime Interface over gRPC: what a kubelet says to its engine, by the messages of cri.proto."""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import grpc
from grpc_tools import protoc

_HERE = Path(__file__).resolve().parent
_PREFIX = "/runtime.v1.RuntimeService/"


def _compiled() -> ModuleType:
    """The module that protoc makes of cri.proto."""
    with tempfile.TemporaryDirectory(prefix="rewarm-cri-") as directory:
        status = protoc.main(["protoc", f"-I{_HERE}", f"--python_out={directory}", str(_HERE / "cri.proto")])
        assert status == 0, "protoc failed"
        sys.path.insert(0, directory)
        try:
            return import_module("cri_pb2")
        finally:
            sys.path.remove(directory)


pb: Any = _compiled()
"""The messages: `pb.ContainerConfig` and so on."""
_METHODS = pb.DESCRIPTOR.services_by_name["RuntimeService"].methods_by_name


class CriError(Exception):
    """A call that the engine refused; the text is what a kubelet would put into the pod's events."""


class Cri:
    """A client of the engine that listens on the unix socket `socket`."""

    def __init__(self, socket: Path) -> None:
        # Messages of a container's status hold its whole spec.
        self._channel = grpc.insecure_channel(f"unix://{socket}", [("grpc.max_receive_message_length", 64 << 20)])

    def __enter__(self) -> Cri:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def call(self, method: str, *, within: float = 120.0, **fields: Any) -> Any:
        """The answer of one call; `fields` are those of its request. Raises CriError.

        `within`: seconds, the kubelet's runtimeRequestTimeout.
        """
        described = _METHODS[method]
        request = getattr(pb, described.input_type.name)
        answer = getattr(pb, described.output_type.name)
        send = self._channel.unary_unary(_PREFIX + method, request.SerializeToString, answer.FromString)
        try:
            return send(request(**fields), timeout=within)
        except grpc.RpcError as error:
            raise CriError(f"{method}: {error.code().name}: {error.details()}") from error
