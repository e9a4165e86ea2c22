"""Running `vcache` in this process (fast) and as a process of its own (real)."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.cluster import eventually
from typer.testing import CliRunner, Result

from vcache.cli.app import app


def invoke(*arguments: str) -> Result:
    """In this process. Leaves the `vcache` logger as it was: a command configures it, and other tests capture it."""
    logger = logging.getLogger("vcache")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    try:
        return CliRunner().invoke(app, list(arguments))
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@contextmanager
def _as_in_a_terminal() -> Iterator[None]:
    """Processes started in the block hear Ctrl-C, also when these tests run in the background of a shell, which has its
    background ignore it."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Process:
    """A `vcache` process. Standard output and error are kept apart, in files."""

    def __init__(self, folder: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self._out, self._err = tempfile.mkstemp(dir=folder)[1], tempfile.mkstemp(dir=folder)[1]
        with open(self._out, "wb") as out, open(self._err, "wb") as err, _as_in_a_terminal():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vcache.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **(env or {})},
            )

    @property
    def out(self) -> str:
        return Path(self._out).read_text()

    @property
    def err(self) -> str:
        return Path(self._err).read_text()

    def wait_for(self, text: str) -> None:
        def seen() -> bool:
            if self.process.poll() is not None and text not in self.out:
                raise AssertionError(f"ended with {self.process.returncode}: {self.out}{self.err}")
            return text in self.out

        eventually(seen, what=f"{text!r} on standard output")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal; the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(20)


class Starter:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Process] = []

    def __call__(self, *arguments: str, env: dict[str, str] | None = None) -> Process:
        self._started.append(Process(self._folder, *arguments, env=env))
        return self._started[-1]

    def kill_all(self) -> None:
        for started in self._started:
            if started.process.poll() is None:
                started.process.kill()
            started.process.wait(10)
