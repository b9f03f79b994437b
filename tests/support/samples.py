"""Sample pages for the OCR workload, drawn in its own layer's Pillow so that the tests need none of their own."""

from __future__ import annotations

import base64
import os

from support import rootfs
from support.proc import command

# What the model reads on the pages that tests ask it for.
TEXTS = {
    "invoice": ["Invoice 4711", "Total 128.50 EUR"],
    "label": ["FRAGILE - HANDLE WITH CARE", "Lot 20260131-77"],
}


def png(name: str) -> bytes:
    """A page of `workloads.sample.PAGES`, the same bytes each time. Raises rootfs.NotPrepared, CommandFailed."""
    path = ":".join(str(layer) for layer in (rootfs.workloads() / "opt/app", rootfs.layer("ocr") / "opt/ocr"))
    code = (
        "import base64, sys; from support.workloads import sample; "
        "print(base64.b64encode(sample.named(sys.argv[1])).decode())"
    )
    # The machine's own Python is of the suite that the layer was built for.
    done = command("/usr/bin/python3", "-B", "-c", code, name, env={**os.environ, "PYTHONPATH": path})
    return base64.b64decode(done.stdout)
