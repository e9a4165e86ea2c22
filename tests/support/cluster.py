"""Real processes for tests: a manager, lenders, engines; each with a bounded start and an unconditional end."""

from __future__ import annotations

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

from vcache.spec import KVCacheSpec
from vcache.worker import Pending, Worker, WorkerError

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
    """A process of its own with one engine: calls methods of `support.engine_worker.EngineWorker` by name."""

    def __init__(self, config: dict[str, Any], spec: dict[str, Any], kind: type | None = None) -> None:
        """Waits until it is ready. `kind`: what the process serves, default `EngineWorker`."""
        from support.engine_worker import EngineWorker

        self._kind = kind or EngineWorker
        self._worker = Worker(self._kind, {"config": config, "spec": spec})
        self._begun: Pending[Any] | None = None
        self._wait(lambda: self._worker.ready(START_TIMEOUT))

    def start(self, function: str, *arguments: Any) -> None:
        self._begun = self._worker.begin(getattr(self._kind, function), *arguments)

    def answer(self, timeout: float = 30.0) -> Any:
        """What the method that was started last returns. Fails with the end of the worker's log when it raised."""
        assert self._begun is not None
        begun = self._begun
        return self._wait(lambda: begun.result(timeout))

    def call(self, function: str, *arguments: Any, timeout: float = 30.0) -> Any:
        self.start(function, *arguments)
        return self.answer(timeout)

    def retrieve(self, *arguments: Any) -> tuple[list[bool], Any]:
        """The mask, and the bytes of all rows of the cache as an array `[slots, regions, row_bytes]`."""
        import numpy as np

        found = self.call("retrieve", *arguments)
        return found.mask, np.frombuffer(found.raw, dtype=np.uint8).reshape(found.shape)

    def store(self, tokens: list[int], layout: str = "2BNHD") -> None:
        """A whole prompt of up to 96 tokens, from the beginning of a cache."""
        self.call("store", layout, tokens, list(range(len(tokens))), 12, 8, 0, 0)

    def check(self, spec: KVCacheSpec, tokens: list[int], layout: str = "2BNHD") -> int:
        """Retrieve; whatever is True must be byte-equal. The number of True."""
        import numpy as np
        from support.paged import content

        slots = list(range(len(tokens)))
        mask, rows = self.retrieve(layout, tokens, slots, 12, 8, 0)
        found = sum(mask)
        assert mask == [i < found for i in slots]
        if found:
            assert np.array_equal(rows[:found], content(spec, tokens[:found])), "wrong bytes under a True"
        return found

    def signal(self, number: signal.Signals) -> None:
        self._worker.signal(number)

    def kill(self) -> None:
        self._worker.kill()

    def _wait(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except WorkerError as error:
            raise AssertionError(f"in the engine process: {error}\n{self._worker.tail()}") from None
