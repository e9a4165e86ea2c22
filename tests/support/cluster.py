"""Real processes for tests: a manager, lenders, engines; each with a bounded start and an unconditional end."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_TIMEOUT = 60.0


def eventually(check: Callable[[], Any], timeout: float = 20.0, *, what: str = "condition") -> Any:
    """Poll until `check()` is truthy; the value. Fails with the last value seen."""
    deadline = time.monotonic() + timeout
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout} s, last seen {value!r}")
        select.select([], [], [], 0.02)


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Command:
    """A `vcache` command as a child process. Output goes to a file, for the failure message."""

    def __init__(self, folder: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.log = folder / f"{arguments[0]}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vcache.cli", *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            )

    def wait_for(self, text: str, timeout: float = START_TIMEOUT) -> None:
        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}: {self.log.read_text()}")
            return text in self.log.read_text()

        eventually(ready, timeout, what=f"{text!r} in {self.log.name}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(10)


class EngineProcess:
    """A process of its own with one engine; runs functions of `support.engine_worker` in it."""

    def __init__(
        self, config: dict[str, Any], spec: dict[str, Any], main: Callable[..., None] | None = None, *, wait: bool = True
    ) -> None:
        """`main`: what the process runs; default `support.engine_worker.main`. With `wait`, until it is ready."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        if main is None:
            from support.engine_worker import main
        self.process = context.Process(target=main, args=(theirs, config, spec), daemon=True)
        self.process.start()
        theirs.close()
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        assert self._answer(START_TIMEOUT) == "ready"

    def start(self, function: str, *arguments: Any) -> None:
        self._pipe.send((function, arguments))

    def answer(self, timeout: float = 30.0) -> Any:
        return self._answer(timeout)

    def call(self, function: str, *arguments: Any, timeout: float = 30.0) -> Any:
        self.start(function, *arguments)
        return self._answer(timeout)

    def _answer(self, timeout: float) -> Any:
        if not self._pipe.poll(timeout):
            raise AssertionError(f"engine process gave no answer in {timeout} s")
        kind, value = self._pipe.recv()
        if kind == "error":
            raise AssertionError(f"in the engine process: {value}")
        return value

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process.is_alive():
            self.signal(signal.SIGCONT)
            self.process.kill()
        self.process.join(10)
        self._pipe.close()
