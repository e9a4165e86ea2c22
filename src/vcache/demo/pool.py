"""The memory that the engines of the demo share: a manager and a lender, each a process, and questions to them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from os import environ
from pathlib import Path

from . import DemoError
from .processes import Child, child_environment, guarded

READY = 30.0
"""Seconds within which a manager or a lender must be ready."""
STORE = 60.0
"""Seconds within which what an engine computed must be in the pool."""


class Pool:
    """Started by `start`, ended with the stack that it was given."""

    def __init__(self, stack: ExitStack, folder: Path, kind: str, size: int) -> None:
        """`kind`: `host` or `cuda`. `size`: payload bytes to lend."""
        self.address = f"unix://{folder}/manager.sock"
        self._stack = stack
        self._folder = folder
        self.lent = f"{size / 2**20:.0f} MiB of {'host memory' if kind == 'host' else 'VRAM'}"
        self._lend = ["lend", "--address", self.address, "--kind", kind, "--size", f"{size}B"]
        self._manager: Child | None = None

    def start(self) -> None:
        """Start manager and lender. Blocks until the memory is in the pool."""
        self.start_manager()
        brokers = {"VCACHE_SEGMENT_BROKER_DIR": str(self._folder / "brokers")}
        self._run("lender", self._lend, brokers)

    def start_manager(self) -> None:
        self._manager = self._run("manager", ["serve", "--address", self.address])

    def kill_manager(self) -> None:
        """SIGKILL."""
        if self._manager is not None:
            self._manager.kill()

    def chunks(self) -> int:
        """Chunks that can be read now, as `vcache status` says. Raises `DemoError`."""
        command = [sys.executable, "-m", "vcache.cli", "status", "--address", self.address, "--json"]
        done = subprocess.run(command, env=child_environment(environ), capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            raise DemoError(f"vcache status: {done.stderr.strip() or f'ended with code {done.returncode}'}")
        return int(json.loads(done.stdout)["gauges"]["chunks"])

    def wait_for_chunks(self, wanted: int) -> None:
        """Return when there are so many. Raises `DemoError` with the number of those that came within `STORE` seconds."""
        deadline = time.monotonic() + STORE
        while (seen := self.chunks()) < wanted:
            if time.monotonic() > deadline:
                raise DemoError(
                    f"only {seen} of {wanted} chunks are in the pool after {STORE:.0f} s: VCache did not do its work"
                )
            time.sleep(0.1)

    def _run(self, name: str, arguments: list[str], env: Mapping[str, str] | None = None) -> Child:
        """Start a command of VCache; it prints one line when it is ready."""
        child = self._stack.enter_context(Child(name, guarded("vcache.cli", *arguments), self._folder, env=env))
        child.line(READY)
        return child
