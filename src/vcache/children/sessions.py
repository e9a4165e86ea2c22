"""All processes of a session: a server and whatever it started, ended together."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

TRACKER = b"multiprocessing.resource_tracker"


def members(session: int) -> list[int]:
    """Processes whose session is `session`, without those that ended and wait to be reaped."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it ended while we looked
                continue
            state, _, _, own = stat[stat.rindex(")") + 2 :].split()[:4]
            if int(own) == session and state not in "ZX":
                found.append(int(entry.name))
    return found


def kill_session(session: int, timeout: float = 5.0) -> None:
    """SIGKILL for all processes of a session; returns when they are gone. Idempotent.

    Python's resource trackers are left alone for up to `timeout` seconds: when all others are dead they unlink the shared
    memory that those left behind, and end. Raises `TimeoutError` when a process survives SIGKILL.
    """
    deadline = time.monotonic() + timeout
    while left := members(session):
        workers = [pid for pid in left if not _is_tracker(pid)]
        late = time.monotonic() > deadline
        if late and time.monotonic() > deadline + timeout:
            raise TimeoutError(f"processes {left} survive SIGKILL")
        # A process that ends its own session goes last.
        for pid in sorted(left if late else workers, key=lambda pid: pid == os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _is_tracker(pid: int) -> bool:
    try:
        return TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
