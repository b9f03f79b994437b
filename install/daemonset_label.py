"""The node's label, by the Kubernetes API: one PATCH, with the pod's own token, of one label of the pod's own node.

Standard library only: a client library would bring more code than all of the install, for one request.
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
from pathlib import Path

from daemonset_host import Problem

LABEL = "rewarm.dev/installed"
TIMEOUT = 15.0
MAX_ANSWER = 8 << 20
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


class NodeLabel:
    """The label of one node. `account` is the directory with the ServiceAccount's token and the API server's CA."""

    def __init__(self, node: str, server: tuple[str, int], account: Path) -> None:
        if not _NAME.fullmatch(node):
            raise Problem(f"label the node: {node!r} is no node's name; set NODE_NAME from spec.nodeName")
        self.node = node
        self.server = server
        self.account = account

    def set(self) -> None:
        """Sets it to `true`; it may be set already. Raises Problem."""
        self._patch("true")

    def remove(self) -> None:
        """Removes it; it need not be there. Raises Problem."""
        self._patch(None)

    def _patch(self, value: str | None) -> None:
        what = f"{'set' if value else 'remove'} the label {LABEL} of node {self.node}"
        try:
            # Read each time: the kubelet renews both.
            token = (self.account / "token").read_text().strip()
            context = ssl.create_default_context(cafile=str(self.account / "ca.crt"))
            status, answer = self._send(context, token, {"metadata": {"labels": {LABEL: value}}})
        except (OSError, http.client.HTTPException) as error:
            cause = str(error) or type(error).__name__
            raise Problem(f"{what}: {cause}; tried again later") from None
        if status != 200:
            step = "see config/kubernetes/base, account.yaml and admission.yaml"
            raise Problem(f"{what}: the API server answers {status}: {_message(answer)}; {step}")
        try:
            found = json.loads(answer)["metadata"].get("labels", {}).get(LABEL)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise Problem(f"{what}: the API server's answer is not a node; tried again later") from None
        if found != value:
            raise Problem(f"{what}: it is {found!r} afterwards; something else changes it")

    def _send(self, context: ssl.SSLContext, token: str, patch: object) -> tuple[int, bytes]:
        connection = http.client.HTTPSConnection(*self.server, timeout=TIMEOUT, context=context)
        try:
            headers = {
                "Authorization": f"Bearer {token}",
                "Content-Type": "application/merge-patch+json",
                "Accept": "application/json",
                "User-Agent": "rewarm-node",
            }
            path = f"/api/v1/nodes/{self.node}?fieldManager=rewarm-node"
            connection.request("PATCH", path, json.dumps(patch), headers)
            response = connection.getresponse()
            return response.status, response.read(MAX_ANSWER)
        finally:
            connection.close()


def _message(answer: bytes) -> str:
    try:
        text = str(json.loads(answer)["message"])
    except (ValueError, KeyError, TypeError):
        text = answer.decode(errors="replace")
    return " ".join(text.split())[:400]
