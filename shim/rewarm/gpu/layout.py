"""Where the chunks of device memory go: the pieces of each GPU lie one after the other."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from .pieces import WINDOW, ZEROS, Piece


class Layout:
    """Which window is whose, before there is memory for it."""

    def __init__(self, pieces: Sequence[Piece], gpus: int) -> None:
        """`gpus`: how many the indices of the pieces speak of. Looks at every window: for while there is to wait."""
        self.bases = [0] * gpus
        """By the index of the GPU: the address of its first piece, once there is one."""
        self.zeros: list[list[tuple[int, int]]] = [[] for _ in range(gpus)]
        """By the index of the GPU: offset from its base, and bytes, of windows that are zeros."""
        # Chunks have the numbers from 0 on, each once (pieces.py).
        count = sum(len(piece.chunks) - piece.chunks.count(ZEROS) for piece in pieces)
        self._gpu = bytearray(count)
        self._offset = array("Q", bytes(8 * count))
        ends = [0] * gpus
        for piece in pieces:
            at = ends[piece.gpu]
            ends[piece.gpu] += piece.size
            runs = self.zeros[piece.gpu]
            begun = len(runs)  # no run goes on from one piece into the next, which is another allocation
            for chunk in piece.chunks:
                if chunk != ZEROS:
                    self._gpu[chunk], self._offset[chunk] = piece.gpu, at
                elif len(runs) > begun and sum(runs[-1]) == at:
                    runs[-1] = runs[-1][0], runs[-1][1] + WINDOW
                else:
                    runs.append((at, WINDOW))
                at += WINDOW

    def __getitem__(self, chunk: int) -> tuple[int, int]:
        """Index of the GPU and address."""
        gpu = self._gpu[chunk]
        return gpu, self.bases[gpu] + self._offset[chunk]
