"""Runs PTX without a GPU: one block of threads in step, as far as the text of gpu/blake3_ptx.py goes.

All threads take the same way, which is checked at every branch; a branch that parts them is an error, as is a word that
is not known. So is a word of shared memory that one thread writes and another uses without a barrier between.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[Any]
_COMPARE: dict[str, Callable[[Words, Words], Words]] = {
    "lt": np.less, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
_SHARED = "tree"


class Block:
    """The kernel `name` of `text`. `memory` is all that it can reach, as 32-bit words from address `base` on."""

    def __init__(self, text: str, threads: int, memory: Words, base: int) -> None:
        self.threads, self.memory, self.base = threads, memory, base
        body = text[text.index("{") + 1 : text.rindex("}")]
        self.lines = [line for line in (part.strip() for part in body.splitlines()) if line]
        self.labels = {line[:-1]: at for at, line in enumerate(self.lines) if line.endswith(":")}
        self.registers: dict[str, Words] = {}
        for kind, names in re.findall(r"\.reg \.(\w+) ([^;]+);", body):
            dtype = {"b32": np.uint32, "b64": np.uint64, "pred": np.bool_}[kind]
            for word in names.split(", "):
                name, _, count = word.rstrip(">").partition("<")
                for one in [f"{name}{at}" for at in range(int(count))] if count else [name]:
                    self.registers[one] = np.zeros(threads, dtype)
        shared = re.search(r"\.shared \.align 16 \.b8 tree\[(\d+)\];", body)
        assert shared is not None
        self.shared = np.zeros(int(shared[1]) // 4, np.uint32)
        # Since the last barrier, by the word of shared memory: who has written it, and who has read it (several: -2).
        self.writers = np.full(len(self.shared), -1)
        self.readers = np.full(len(self.shared), -1)

    def run(self, parameters: dict[str, int], block: int) -> None:
        self.parameters = parameters
        self.registers["%tid.x"] = np.arange(self.threads, dtype=np.uint32)
        self.registers["%ctaid.x"] = np.full(self.threads, block, np.uint32)
        at = 0
        while True:
            line = self.lines[at]
            at += 1
            if line.endswith(":") or line.startswith("."):
                continue
            match = re.fullmatch(r"(?:@(!?)(%\w+) )?([\w.]+) ?([^;]*);", line)
            assert match is not None, line
            inverted, guard, word, rest = match.groups()
            active = np.ones(self.threads, np.bool_)
            if guard is not None:
                active = self.registers[guard] != (inverted == "!")
            if word == "ret":
                return
            if word == "bra":
                assert active.all() or not active.any(), f"threads part at: {line}"
                if active.all():
                    at = self.labels[rest]
            else:
                self._step(word, rest, active, line)

    def _step(self, word: str, rest: str, active: Words, line: str) -> None:
        kind, *parts = word.split(".")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        with np.errstate(over="ignore"):
            if kind == "ld":
                self._load(parts, operands, active)
            elif kind == "st":
                self._store(parts, operands, active)
            elif word == "bar.sync":
                self.writers[:] = self.readers[:] = -1
            elif kind == "setp":
                left, right = (self._value(one, np.uint32) for one in operands[1:])
                self._set(operands[0], _COMPARE[parts[0]](left, right), active)
            elif word == "mul.wide.u32":
                left, right = (self._value(one, np.uint32).astype(np.uint64) for one in operands[1:])
                self._set(operands[0], left * right, active)
            else:
                assert parts[-1] in ("u32", "b32", "u64"), line
                dtype = np.uint64 if parts[-1] == "u64" else np.uint32
                values = [self._value(one, dtype) for one in operands[1:]]
                self._set(operands[0], self._reckon(kind, parts, values), active)

    def _reckon(self, kind: str, parts: list[str], values: list[Words]) -> Words:
        if kind == "mov":
            return values[0]
        if kind == "shf":
            low, high, amount = values
            assert parts == ["r", "wrap", "b32"] and (low is high or (low == high).all())
            return low >> amount | low << (np.uint32(32) - amount)
        if kind == "mul":
            assert parts[0] == "lo"
            return values[0] * values[1]
        operations: dict[str, Any] = {
            "add": np.add,
            "xor": np.bitwise_xor,
            "and": np.bitwise_and,
            "shr": np.right_shift,
        }
        result: Words = operations[kind](*values)
        return result

    def _load(self, parts: list[str], operands: list[str], active: Words) -> None:
        if parts[0] == "param":
            self._set(operands[0], np.full(self.threads, self.parameters[operands[1][1:-1]], np.uint64), active)
            return
        names = operands[0].strip("{}").split(", ")
        where, memory = self._words(parts[0], operands[1])
        if parts[-1] == "u64":
            low, high = (memory[where[active] + at].astype(np.uint64) for at in range(2))
            self._set(names[0], self._spread(low | high << np.uint64(32), active), active)
            return
        assert parts[1:] == ["v4", "u32"]
        assert (where[active] % 4 == 0).all(), "a vector that is not aligned"
        if parts[0] == "shared":
            self._note_read(where, active)
        for at, name in enumerate(names):
            self._set(name, self._spread(memory[where[active] + at], active), active)

    def _store(self, parts: list[str], operands: list[str], active: Words) -> None:
        assert parts[1:] == ["v4", "u32"]
        where, memory = self._words(parts[0], operands[0])
        assert (where[active] % 4 == 0).all(), "a vector that is not aligned"
        if parts[0] == "shared":
            self._note_write(where, active)
        for at, name in enumerate(operands[1].strip("{}").split(", ")):
            memory[where[active] + at] = self.registers[name][active]

    def _note_read(self, where: Words, active: Words) -> None:
        for thread in map(int, np.flatnonzero(active)):
            words = slice(where[thread], where[thread] + 4)
            assert np.isin(self.writers[words], (-1, thread)).all(), "read beside another thread's write"
            seen = self.readers[words]
            self.readers[words] = np.where((seen == -1) | (seen == thread), thread, -2)

    def _note_write(self, where: Words, active: Words) -> None:
        for thread in map(int, np.flatnonzero(active)):
            words = slice(where[thread], where[thread] + 4)
            assert np.isin(self.writers[words], (-1, thread)).all(), "two threads write one word"
            assert np.isin(self.readers[words], (-1, thread)).all(), "written beside another thread's read"
            self.writers[words] = thread

    def _words(self, space: str, operand: str) -> tuple[Words, Words]:
        """The index of the first word for each thread, and what it is an index into."""
        name, _, offset = operand[1:-1].partition("+")
        address = self.registers[name].astype(np.int64) + int(offset or 0)
        if space == "shared":
            return address // 4, self.shared
        assert space == "global"
        return (address - self.base) // 4, self.memory

    def _spread(self, values: Words, active: Words) -> Words:
        full = np.zeros(self.threads, values.dtype)
        full[active] = values
        return full

    def _value(self, operand: str, dtype: Any) -> Words:
        if operand.startswith("%"):
            return self.registers[operand]
        return np.full(self.threads, 0 if operand == _SHARED else int(operand, 0), dtype)

    def _set(self, name: str, value: Words, active: Words) -> None:
        register = self.registers[name]
        assert register.dtype == value.dtype, f"{name} is {register.dtype}, not {value.dtype}"
        if active.all():
            self.registers[name] = value.copy()
        else:
            register = register.copy()
            register[active] = value[active]
            self.registers[name] = register
