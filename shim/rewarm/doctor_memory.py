"""Checks of what decides how fast memory comes back: the cache of packs, and huge pages. All works without them."""

from __future__ import annotations

import os

from rewarm.checks import OK, WARNING, Check, Node
from rewarm.doctor_places import cannot_write, real_parent, writable_by_others
from rewarm.store.cache import cache_for
from rewarm.store.directory import DirectoryStore
from rewarm.store.probe import file_system, is_network

_ENABLED = "/sys/kernel/mm/transparent_hugepage/enabled"


def cache(node: Node) -> Check:
    """Never a failure: what cannot be cached is read from the store each time."""
    settings = node.settings
    store = DirectoryStore(settings.store)
    found = cache_for(settings, store)
    if found is None:
        why = "off in the settings" if settings.cache == "off" else "none: the store is not on a network file system"
        return Check("cache", OK, why)
    path = str(found.directory)
    there = real_parent(path)
    if there != path and os.path.lexists(path):
        return Check("cache", WARNING, f"{path} is not a directory", "remove it, or set `cache` in the settings")
    problem = cannot_write(there)
    if problem:
        step = "set `cache` in the settings to a directory on a local disk, or to off"
        return Check("cache", WARNING, f"{there} cannot be written: {problem}", step)
    loose = writable_by_others(path) if there == path else ""
    if loose:
        step = f"run: chown 0:0 {path} && chmod 700 {path}; it holds the memory of programs"
        return Check("cache", WARNING, f"{path}: {loose}", step)
    return _place(path, there, real_parent(str(store.root)), settings.cache_size)


def _place(path: str, there: str, store: str, limit: int) -> Check:
    """Whether it saves the store's share any reading, and has room for what it may take."""
    device = os.stat(there).st_dev
    kind = file_system(device)
    if is_network(kind) or device == os.stat(store).st_dev:
        beside = "the store's own" if device == os.stat(store).st_dev else "a network"
        step = "set `cache` in the settings to a directory on a local disk, or to off"
        return Check("cache", WARNING, f"{path} is on {beside} file system ({kind or 'of unknown type'})", step)
    status = os.statvfs(there)
    room = status.f_bavail * status.f_frsize + _taken(path)
    found = f"{path}, up to {limit / 10**9:.1f} GB"
    if room < limit:
        step = f"set `cache_size` in the settings below {room / 10**9:.1f}G, or free space under {there}"
        return Check("cache", WARNING, f"{found}, with room for {room / 10**9:.1f} GB", step)
    return Check("cache", OK, found if there == path else f"{found} (made when it is needed)")


def _taken(path: str) -> int:
    """Bytes on the disk of what the cache holds already; what vanishes meanwhile, or cannot be read, counts as none."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += os.stat(os.path.join(directory, name), follow_symlinks=False).st_blocks * 512
            except OSError:
                continue
    return total


def huge_pages(node: Node) -> Check:
    """Filling small pages costs the kernel a fault each: several times the time."""
    try:
        with open(_ENABLED, encoding="ascii", errors="replace") as file:
            text = file.read()
    except FileNotFoundError:
        step = "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE; without it restores only are slower"
        return Check("huge pages", WARNING, "this kernel has no transparent huge pages", step)
    chosen = text.partition("[")[2].partition("]")[0] or text.strip()
    if chosen == "never":
        step = f"run: echo madvise > {_ENABLED}; without it restores only are slower"
        return Check("huge pages", WARNING, "transparent huge pages are off (never)", step)
    return Check("huge pages", OK, f"transparent huge pages: {chosen}")
