"""Start a manager on this host when none answers, so that one flag of vLLM is enough."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from ...manager.address import parse_address
from ...segment.handover import prepare_broker_dir

logger = logging.getLogger("vllm.vcache")

START_TIMEOUT = 20.0
IDLE_EXIT = 300.0
"""Seconds after which a manager that was started here ends when nothing is connected any more: no engine, no lender."""


def ensure_manager(address: str, timeout: float = START_TIMEOUT, idle_exit: float = IDLE_EXIT) -> bool:
    """Make sure that something listens at a unix address; whether it does. Blocks up to `timeout` seconds.

    Any number of processes may call this at once: a lock file lets one of them start the manager. The manager is a process of
    its own, which outlives the caller, and ends when nothing has been connected to it for `idle_exit` seconds. Its output goes
    to `manager.log` beside the socket.
    """
    path = Path(parse_address(address).path)
    if _answers(path):
        return True
    folder = prepare_broker_dir(str(path.parent))
    deadline = time.monotonic() + timeout
    with (folder / "autostart.lock").open("w") as lock:
        if not _lock(lock.fileno(), deadline):
            return _answers(path)
        if _answers(path):
            return True
        process = _start(address, folder / "manager.log", idle_exit)
        while time.monotonic() < deadline:
            if _answers(path):
                logger.info("started a VCache manager at %s (process %d, log %s)", address, process.pid, folder / "manager.log")
                return True
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            break
    if _answers(path):
        return True
    logger.error("no VCache manager at %s, and starting one failed: see %s", address, folder / "manager.log")
    return False


def _start(address: str, log: Path, idle_exit: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vcache.cli", "serve", "--address", address, "--idle-exit", f"{idle_exit:g}"]
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
            env={name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"},
        )


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _lock(descriptor: int, deadline: float) -> bool:
    """Take the lock, at most until `deadline`."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)  # flock has no wait with a time limit
        else:
            return True
