"""A model server: OCR by RapidOCR (PP-OCR detection, orientation and recognition networks) on ONNX Runtime.

Loads the weights that ship in the wheel, warms itself up on pages of several shapes, and then serves:
POST /ocr with an image -> {"lines": [{"text", "score"}], "count": N}; GET /health; GET /stats.
Equal images give equal answers. Environment: PORT (8000), OCR_THREADS (2).
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from support.workloads import web

BEGAN = time.monotonic()


class Reader:
    """The model. One page at a time: its pre- and post-processing objects keep state between steps."""

    def __init__(self) -> None:
        # Read when the library is loaded: else it keeps a database below /root/.cache and a thread to send it.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        from rapidocr import RapidOCR  # type: ignore[import-not-found, unused-ignore]

        self.imported = time.monotonic()
        self._engine = RapidOCR(
            params={
                "Global.log_level": "critical",
                "EngineConfig.onnxruntime.intra_op_num_threads": int(os.environ.get("OCR_THREADS", "2")),
                # As PaddleOCR's own server: pages are shrunk to 960 pixels; small ones are not blown up to 736.
                "Det.limit_type": "max",
                "Det.limit_side_len": 960,
            }
        )
        self._lock = threading.Lock()
        self.served = 0

    def read(self, image: bytes) -> dict[str, Any]:
        with self._lock:
            found = self._engine(image)
            self.served += 1
        texts, scores = found.txts or (), found.scores or ()
        lines = [{"text": t, "score": round(float(s), 6)} for t, s in zip(texts, scores, strict=True)]
        return {"lines": lines, "count": len(lines)}


def main() -> None:
    reader = Reader()
    from support.workloads import sample

    for name in sample.PAGES:
        reader.read(sample.named(name))
    warm = time.monotonic()
    reader.served = 0

    def stats(_body: bytes) -> dict[str, Any]:
        status = Path("/proc/self/status").read_text()
        return {
            "pid": os.getpid(),
            "served": reader.served,
            "began": BEGAN,  # CLOCK_MONOTONIC seconds
            "import_s": reader.imported - BEGAN,
            "warm_up_s": warm - reader.imported,
            "resident_kib": int(status.split("VmRSS:")[1].split()[0]),
        }

    web.run(web.port(), {"/ocr": reader.read, "/stats": stats})


if __name__ == "__main__":
    main()
