"""Asks the system: what this host is called, how much memory can still be had, how many files may be open."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import SegmentError

_UNLIMITED = 2**60


class AvailableMemory(NamedTuple):
    """Host memory that could be allocated now."""

    nbytes: int
    limit: str
    """What sets the limit, for messages."""


HOST_ID = "VCACHE_HOST_ID"
"""Environment variable that replaces the kernel's own identity."""


def host_id() -> str:
    """Name this host: processes with the same one share memory. `VCACHE_HOST_ID` where it is set, for containers that
    run on one kernel but share no memory (or not the sockets' folder); else that of the running kernel, which is another one
    after a reboot. Raises `SegmentError` where the system has none."""
    if named := os.environ.get(HOST_ID, "").strip():
        return named
    path = Path("/proc/sys/kernel/random/boot_id")
    try:
        return path.read_text().strip()
    except OSError as error:
        raise SegmentError(
            f"host identity: cannot read {path}: {error.strerror}; VCache segments need Linux with /proc"
        ) from None


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> AvailableMemory:
    """Find how much host memory can be had: the least of what the system has and what this process's memory cgroup allows."""
    found = AvailableMemory(_system_available(proc), "the system's available memory")
    for headroom in _cgroup_headroom(proc, cgroups):
        if headroom < found.nbytes:
            found = AvailableMemory(headroom, "this container's memory limit (cgroup)")
    return found


def raise_file_limit() -> int:
    """Let this process open as many files as the system allows it to: each connection and each slab needs one. The limit now.

    Only the soft limit changes. Where even that is not allowed, it stays as it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _system_available(proc: Path) -> int:
    path = proc / "meminfo"
    try:
        fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError) as error:
        raise SegmentError(f"available memory: cannot read it from {path} ({error})") from None


def _cgroup_headroom(proc: Path, cgroups: Path) -> list[int]:
    """Bytes left below every memory limit that applies: version 2 (unified) and version 1, own group and its parents.

    A group that is not visible here (another namespace) is skipped: its root, which is, carries the container's limit."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            root, limit, usage, cache = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage, cache = (
                cgroups / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        leaf = root / group.strip("/")
        for folder in (leaf, *leaf.parents):
            headroom = _headroom(folder, limit, usage, cache)
            if headroom is not None:
                found.append(headroom)
            if folder == root:
                break
    return found


def _headroom(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        if most == "max" or int(most) >= _UNLIMITED:
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # File pages that nobody uses count as used but are given up before an allocation fails.
        return max(0, int(most) - int((folder / usage).read_text()) + int(stat.get(cache, 0)))
    except (OSError, ValueError):
        return None
