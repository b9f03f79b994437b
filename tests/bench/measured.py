"""What a measurement hands back."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Measured:
    """`samples` holds lists of figures in `unit`, one for each side; `ratio` is what the target speaks of."""

    what: str
    key: str
    samples: dict[str, list[float]]
    ratio: float
    target: str
    held: bool
    more: dict[str, Any] = field(default_factory=dict)
    unit: str = "s"

    def row(self) -> str:
        """A line of the table: what, the sides' medians, the ratio, the target."""
        sides = [f"{label} {median(found):.3f} {self.unit}" for label, found in self.samples.items()]
        cells = (self.what, sides[0], "; ".join(sides[1:]), f"{self.ratio:.2f}", self.target)
        return f"| {' | '.join(cells)} |"


Case = Callable[[Path, Path], list[Measured]]  # a directory of its own and the prefix


def median(found: list[float]) -> float:
    """0 for no samples: a figure that this rewarm does not give."""
    return statistics.median(found) if found else 0.0
