"""The processes of the demo that are commands: manager, lender, vLLM servers: started, watched and ended."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from ..children.sessions import kill_session
from . import DemoError

_ERROR = re.compile(r"\b[A-Za-z]*(Error|Exception)\b.*:")
_UNSAID = re.compile(r"validation errors? for \w+$")
"""pydantic says in the next line what is wrong."""


def child_environment(env: Mapping[str, str], *, offline: bool = True) -> dict[str, str]:
    """`env` without VCache settings of the user, which are not meant for the demo (its log level stays), and with the model
    libraries told to be quiet and, if `offline`, to fetch nothing. Pure."""
    kept = {name: value for name, value in env.items() if not name.startswith("VCACHE_") or name == "VCACHE_LOG_LEVEL"}
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    nothing = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if offline else {}
    return {"OMP_WAIT_POLICY": "PASSIVE", **kept, **quiet, **nothing}


def guarded(module: str, *arguments: str) -> list[str]:
    """Command that runs a Python module, and gets SIGTERM when this process is killed."""
    return [sys.executable, "-m", "vcache.children.guard", str(os.getpid()), module, *arguments]


class Process:
    """A child process that writes to `<name>.log` in `folder`. A context manager: it is gone, with all that it started, after.

    It has a session of its own: Ctrl-C reaches the demo alone, which then ends its children.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        *,
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
        offline: bool = True,
    ) -> None:
        """`env`: added to `child_environment`. `stdout`: where it goes, default the log. `offline`: it must fetch no models."""
        self.name = name
        self.log = folder / f"{name.replace(' ', '-')}.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log if stdout is None else stdout,
                stderr=log,
                env=child_environment(os.environ, offline=offline) | dict(env or {}),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def finish(self, timeout: float) -> None:
        """Wait for its end. Raises `DemoError` when it fails or takes longer than `timeout` seconds."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise DemoError(f"{self.name} (pid {self.pid}) takes longer than {timeout:.0f} s; {self.evidence()}") from None
        if code:
            raise self.ended()

    def kill(self) -> None:
        """SIGKILL for it and what it started, as a crash would end them; returns when they are gone. Idempotent."""
        if self.alive:
            self._process.kill()
        kill_session(self.pid)
        self._process.wait()

    def stop(self, timeout: float = 10.0) -> None:
        """End its input and ask it to go (SIGTERM); after `timeout` seconds SIGKILL. Idempotent."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # unsent bytes for a process that is dead already
                self._process.stdin.close()
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def ended(self) -> DemoError:
        """What to raise when it is found dead."""
        return DemoError(f"{self.name} (pid {self.pid}) ended with code {self._process.wait()}; {self.evidence()}")

    def evidence(self) -> str:
        """The last error in its log, else the last line, and where the rest is."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").split("\n") if line.strip()]
        errors = [
            f"{line} {after}" if _UNSAID.search(line) else line
            for line, after in pairwise([*lines[-200:], ""])
            if _ERROR.search(line) and "root cause" not in line
        ]
        last = (errors or lines or ["it logged nothing"])[-1]
        return f"{last} (log: {self.log})"


class Child(Process):
    """A process whose stdout is read line by line."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, *, env: Mapping[str, str] | None = None) -> None:
        super().__init__(name, command, folder, env=env, stdout=subprocess.PIPE)
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"read-{name}", daemon=True)
        self._reader.start()

    def line(self, timeout: float) -> bytes:
        """The next line of its stdout. Raises `DemoError` when it ends or says nothing for `timeout` seconds."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise DemoError(f"{self.name} (pid {self.pid}) said nothing for {timeout:.0f} s; {self.evidence()}") from None
        if line is None:
            raise self.ended()
        return line

    def stop(self, timeout: float = 10.0) -> None:
        super().stop(timeout)
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)


def poll(found: Callable[[], bool], timeout: float, what: str, interval: float = 0.1) -> float:
    """Seconds until `found()` was true, asked every `interval` seconds. Raises `DemoError` after `timeout` seconds."""
    began = time.monotonic()
    while not found():
        if time.monotonic() - began > timeout:
            raise DemoError(f"{what}: not within {timeout:.0f} s")
        time.sleep(interval)
    return time.monotonic() - began
