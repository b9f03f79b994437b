"""The annotations `rewarm.dev/…`: their keys, and which values each may have."""

from __future__ import annotations

import re

from rewarm.naming import ALLOWED, is_name

PREFIX = "rewarm.dev/"
ENGINES = ("none", "vllm", "sglang")
"""Values of `engine`."""
ON_MISS = ("cold-start", "fail")
_CHOICES = {
    "capture": ("never", "on-ready"),
    "on-miss": ON_MISS,
    "device-memory": ("auto", "off"),
    "engine": ENGINES,
}
KEYS = tuple(sorted((*_CHOICES, "snapshot", "container", "ready")))
_HTTP = re.compile(r"http://:(\d{1,5})(/[!-~]{0,512})")
_LONGEST_SHOWN = 80
_LONGEST_COMMAND = 4096


def problem(key: str, value: str) -> tuple[str, str] | None:
    """What is wrong with an annotation, and what is allowed instead; `key` is without the prefix."""
    if key in _CHOICES:
        allowed = _CHOICES[key]
        return None if value in allowed else (f"{shown(value)} is not one of {', '.join(allowed)}", "")
    if key not in KEYS:
        return f"there is no such key (value {shown(value)})", f"known are {', '.join(KEYS)}"
    if key == "ready":
        if value.startswith("exec:") and (len(value) > _LONGEST_COMMAND or "\0" in value):
            return f"{shown(value)} is longer than {_LONGEST_COMMAND} characters, or has a NUL in it", "exec:CMD"
        good = value == "file" or _is_http(value) or (value.startswith("exec:") and value[5:].strip())
        return None if good else (f"{shown(value)} is not one of file, http://:PORT/PATH, exec:CMD", "")
    return None if is_name(value) else (f"{shown(value)} is not a name", ALLOWED)


def _is_http(value: str) -> bool:
    found = _HTTP.fullmatch(value)
    return found is not None and 0 < int(found[1]) < 65536


def http_target(ready: str) -> tuple[int, str]:
    """Port and path of a value of `ready` that starts with http:// and is a good one."""
    found = _HTTP.fullmatch(ready)
    assert found is not None
    return int(found[1]), found[2]


def shown(value: str) -> str:
    """A value fit for one log line: control characters escaped, never longer than a line should be."""
    text = repr(value[:_LONGEST_SHOWN])
    return text if len(value) <= _LONGEST_SHOWN else f"{text[:-1]}…'"
