"""Lines in the log file that the caller of the runtime reads.

containerd's shim shows its user the last line of the log that has `level: error`; conmon and a person at
a terminal read the text form.
"""

from __future__ import annotations

import json
import sys
import time

from rewarm.oci.argv import Invocation


def write(invocation: Invocation, level: str, message: str) -> None:
    """Append one line of `level` ("error", "warning", "info") in the format the caller asked for."""
    message = " ".join(message.split())
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if invocation.log_format == "json":
        line = json.dumps({"level": level, "msg": message, "time": now})
    else:
        line = f'time="{now}" level={level} msg={json.dumps(message)}'
    if invocation.log:
        try:
            with open(invocation.log, "a", encoding="utf-8") as log:
                log.write(line + "\n")
            return
        except OSError as error:
            # The log is where the caller looks; without it standard error is all that is left.
            sys.stderr.write(f"rewarm: cannot write {invocation.log}: {error.strerror}\n")
    # Standard error of `create` is the container's own: only what the caller would otherwise never see goes there.
    if level == "error" or not invocation.log:
        sys.stderr.write(line + "\n")
