"""The memory that the vLLM instances of the demo share: a manager and a lender, each a process, and questions to them."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from os import environ
from pathlib import Path

from ..config import CacheConfig
from .messages import DemoError
from .processes import Service, child_environment, poll

STORE = 60.0
"""Seconds within which what an instance computed must be in the pool."""


class Pool:
    """Started by `start`, ended with the stack that it was given."""

    def __init__(self, stack: ExitStack, folder: Path, kind: str, size: int) -> None:
        """`kind`: `host` or `cuda`. `size`: payload bytes to lend."""
        self.address = f"unix://{folder}/manager.sock"
        self._stack = stack
        self._folder = folder
        self._lent = ["--kind", kind, "--size", f"{size}B"]
        self._manager: Service | None = None

    def start(self) -> None:
        """Start manager and lender. Blocks until the memory is in the pool."""
        self.start_manager()
        brokers = {"VCACHE_SEGMENT_BROKER_DIR": str(self._folder / "brokers")}
        lender = Service("lender", ["lend", "--address", self.address, *self._lent], self._folder, env=brokers)
        self._stack.enter_context(lender).wait_ready()

    def start_manager(self) -> None:
        self._manager = self._stack.enter_context(Service("manager", ["serve", "--address", self.address], self._folder))
        self._manager.wait_ready()

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

    def wait_for_chunks(self, wanted: int) -> float:
        """Seconds until there are so many. Raises `DemoError` with the number of those that came within `STORE` seconds."""
        seen = 0

        def enough() -> bool:
            nonlocal seen
            seen = self.chunks()
            return seen >= wanted

        try:
            return poll(enough, STORE, "", interval=0.1)
        except DemoError:
            raise DemoError(
                f"only {seen} of {wanted} chunks are in the pool after {STORE:.0f} s: VCache did not do its work"
            ) from None


def whole_chunks(tokens: int) -> int:
    """Chunks that a prompt of `tokens` tokens fills. Pure."""
    return tokens // CacheConfig().chunk_size
