"""Sample pages for the OCR server: PNG images of printed text, the same bytes for the same arguments.

Needs Pillow, which the ocr layer holds.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont  # type: ignore[import-not-found, unused-ignore]

# width, height, lines of text
PAGES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "invoice": (320, 96, ("Invoice 4711", "Total 128.50 EUR")),
    "label": (640, 120, ("FRAGILE - HANDLE WITH CARE", "Lot 20260131-77")),
    "receipt": (400, 560, tuple(f"{count} x item {count * 37:04d}   {count * 3.25:.2f}" for count in range(1, 13))),
    "letter": (
        900,
        640,
        (
            "Dear reader,",
            "this page was drawn to be read by a machine.",
            "The quick brown fox jumps over the lazy dog, 0123456789 times.",
            "It holds lines of several lengths: every length is a shape",
            "of its own to the recogniser.",
            "Yours faithfully",
        ),
    ),
    # A4 as a scanner makes it at 150 dots an inch.
    "sheet": (1240, 1754, tuple(f"{count}. Paragraph number {count * 7919} of a sheet." for count in range(1, 25))),
}


def page(width: int, height: int, lines: Sequence[str]) -> bytes:
    """A white page of `width` x `height` pixels with black lines of text spread over its height, as PNG."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    step = height / len(lines)
    font = ImageFont.load_default(size=min(28.0, step * 0.6))
    for number, line in enumerate(lines):
        draw.text((width * 0.04, step * (number + 0.2)), line, fill="black", font=font)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def named(name: str) -> bytes:
    """A page of PAGES. Raises KeyError."""
    return page(*PAGES[name])
