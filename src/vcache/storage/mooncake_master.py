"""A `mooncake_master` beside the manager: started, watched, restarted. No GPU, no torch."""

from __future__ import annotations

import logging
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from ..bindings import MISSING
from ..errors import ConfigError, StorageError
from .mooncake_options import MooncakeOptions, find_master, reachable

logger = logging.getLogger("vcache.storage")

_START_TIMEOUT = 20.0
_STOP_TIMEOUT = 10.0
_WATCH_INTERVAL = 0.5
_STEADY = 30.0
"""A master that ran for so many seconds is restarted at once, and the back-off starts anew."""
_MAX_PAUSE = 30.0

SSD_FLAGS = ("--enable_offload=true", "--offload_on_evict=true", "--promotion_on_hit=true")
"""For lenders with an SSD: what is evicted from memory goes to the disk of the lender that held it, and what is read from there
twice comes back to memory. Not for others: memory without a disk below it is then never evicted, and stays full. (Mooncake's
other mode, writing to disk at once, loses whatever is evicted before its turn.)"""


class MooncakeMaster:
    """Keeps a master answering at `options.master`. One that is there already is used and left alone; when it goes away, or
    ours dies, a new one is started, after a pause that doubles with every quick death.

    A master that restarts has forgotten every chunk: the memory of those that lend to it is kept, and used anew.
    """

    def __init__(
        self, options: MooncakeOptions, *, ssd: bool = False, log: Path | None = None, flags: Sequence[str] = ()
    ) -> None:
        """Start it and wait until it answers, at most 20 seconds. `ssd`: all that lend to it do so with an SSD; `log`: file for
        its output (default: dropped); `flags`: further command line flags. Raises `ConfigError` without the wheel,
        `StorageError` when it does not come up."""
        program = find_master()
        if program is None:
            raise ConfigError(f"mooncake_master is not installed; {MISSING}")
        self._options = options
        host, port = options.address
        self._command = [program, f"--rpc_address={host}", f"--rpc_port={port}", f"--metrics_host={host}"]
        self._command += [f"--metrics_port={options.metrics_port or _free_port(host)}"]
        self._command += [*_metadata_flags(options), *(SSD_FLAGS if ssd else ()), *flags]
        self._log = log
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self.adopted = reachable(options.address)
        """Whether somebody else had started one."""
        if not self.adopted:
            try:
                self._start()
                self._wait_ready()
            except BaseException:
                self._end()
                raise
        self._watcher = threading.Thread(target=self._watch, name="vcache-mooncake-master", daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int | None:
        """Process id of our master; None where somebody else runs it."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def close(self) -> None:
        """End our master; SIGKILL after 10 seconds. Leaves one that was there before. Idempotent."""
        self._stopping.set()
        self._watcher.join()
        self._end()

    def kill(self) -> None:
        """SIGKILL, and start no new one: what a host that fails does to it. Idempotent."""
        self._stopping.set()
        self._watcher.join()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        output: IO[bytes] | int = self._log.open("ab") if self._log is not None else subprocess.DEVNULL
        try:
            # A session of its own: Ctrl-C in a terminal reaches us, and we end it after the manager.
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise StorageError(f"mooncake_master cannot be started: {error}") from None
        finally:
            if not isinstance(output, int):
                output.close()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while not reachable(self._options.address):
            code = self._process.poll() if self._process is not None else None
            if code is not None or time.monotonic() > deadline:
                why = f"ended with {code}" if code is not None else f"did not answer within {_START_TIMEOUT:g} s"
                raise StorageError(f"mooncake_master at {self._options.master} {why}; is the address one of this host?")
            self._stopping.wait(0.05)

    def _end(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _watch(self) -> None:
        pause, since = _WATCH_INTERVAL, time.monotonic()
        while not self._stopping.wait(_WATCH_INTERVAL):
            if self.pid is not None or reachable(self._options.address):
                continue
            code = self._process.poll() if self._process is not None else None
            pause = _WATCH_INTERVAL if time.monotonic() - since > _STEADY else min(2 * pause, _MAX_PAUSE)
            logger.warning("mooncake_master is gone (%s); a new one starts in %.1f s", code if code is not None else "", pause)
            if self._stopping.wait(pause):
                return
            since = time.monotonic()
            try:
                self._start()
            except StorageError as error:
                logger.error("%s", error)


def _metadata_flags(options: MooncakeOptions) -> list[str]:
    """Metadata over HTTP at the master's own host: the master serves it."""
    at = urlsplit(options.metadata)
    if at.scheme != "http" or at.hostname != options.address[0]:
        return []
    return [
        "--enable_http_metadata_server=true",
        f"--http_metadata_server_host={at.hostname}",
        f"--http_metadata_server_port={at.port or 80}",
    ]


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise ConfigError(f"storage.options: master: {host} is no address of this host ({error.strerror})") from None
        return int(probe.getsockname()[1])
