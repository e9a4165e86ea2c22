"""Processes that benchmarks measure: started on a core, waited for, ended for certain."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from ..config import VCacheConfig
from ..errors import VCacheError

START_TIMEOUT = 30.0
_STOP_TIMEOUT = 10.0


class Cores(NamedTuple):
    """Which core serves and which one drives. Equal where there is only one."""

    server: int
    client: int

    @property
    def shared(self) -> bool:
        return self.server == self.client


def choose_cores() -> Cores:
    usable = sorted(os.sched_getaffinity(0))
    return Cores(usable[0], usable[-1])


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """This thread, and every process that it starts meanwhile, runs on `core` only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running(
    command: Sequence[str], ready: str, *, core: int | None = None, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run `command` (on `core`) until the block ends: SIGTERM, then SIGKILL. `env`: its whole environment.

    Enters the block once a line of its standard output contains `ready`. Raises `VCacheError` with its last words when that
    does not come within 30 s.
    """
    with tempfile.TemporaryFile("w+") as words, ExitStack() as stack:
        with on_core(core) if core is not None else nullcontext():
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=words, stdin=subprocess.DEVNULL, text=True, env=env
            )
        stack.callback(stop, process)
        if not _says(process, ready, stack):
            stop(process)
            words.seek(0)
            last = " ".join(words.read().split()[-60:]) or "it said nothing"
            raise VCacheError(f"{' '.join(command[:4])} ... did not start: {last}")
        yield process


@contextmanager
def manager_process(core: int | None = None, *, arguments: Sequence[str] = ()) -> Iterator[ManagerProcess]:
    """A manager of its own on a private socket, untouched by this process's `VCACHE_*` variables."""
    with tempfile.TemporaryDirectory(prefix="vcache-bench-") as folder:
        address = f"unix://{folder}/manager.sock"
        command = [sys.executable, "-m", "vcache.cli", "serve", "--address", address, *arguments]
        with running(command, address, core=core, env=clean_environment()) as process:
            yield ManagerProcess(address, process.pid)


@contextmanager
def lender_process(
    address: str,
    kind: str,
    nbytes: int,
    *,
    slab_bytes: int = 0,
    device: str = "",
    prefault: bool = False,
    core: int | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """`vcache lend` until the block ends; enters once it lends. `env`: its whole environment, default without `VCACHE_*`."""
    command = [sys.executable, "-m", "vcache.cli", "lend", "--address", address, "--kind", kind, "--size", str(nbytes)]
    command += ["--slab-size", str(slab_bytes)] if slab_bytes else []
    command += ["--device", device] if device else []
    command += ["--prefault"] if prefault else []
    with running(command, "lending ", core=core, env=clean_environment() if env is None else env) as process:
        yield process


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without `VCACHE_*`, and `more`."""
    return {name: value for name, value in os.environ.items() if not name.startswith("VCACHE_")} | more


class ManagerProcess(NamedTuple):
    address: str
    pid: int

    def config(self, **manager: float) -> VCacheConfig:
        """For clients of it; `manager`: further settings. Untouched by the environment."""
        return VCacheConfig.from_env({}, manager={"address": self.address, **manager})


def resident_bytes(pid: int | None = None) -> int:
    """Resident set of a process (default: this one)."""
    pages = int(Path(f"/proc/{pid or os.getpid()}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, user and system, to 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM, ten seconds, SIGKILL. Idempotent."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _says(process: subprocess.Popen[str], ready: str, stack: ExitStack) -> bool:
    """Wait for the line. What follows it is read and dropped until `stack` ends, so that no full pipe blocks the process."""
    heard: queue.SimpleQueue[bool] = queue.SimpleQueue()
    output = process.stdout
    assert output is not None

    def listen() -> None:
        for line in output:
            if ready in line:
                heard.put(True)
        heard.put(False)
        output.close()

    listener = threading.Thread(target=listen, name="vcache-bench-output", daemon=True)
    listener.start()
    stack.callback(listener.join, _STOP_TIMEOUT)
    stack.callback(stop, process)  # runs first: its end is what ends the listener
    try:
        return heard.get(timeout=START_TIMEOUT)
    except queue.Empty:
        return False
