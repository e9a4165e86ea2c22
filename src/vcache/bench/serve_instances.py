"""vLLM servers that share KV in one way, with the services that the way needs: started, waited for, ended for certain."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ..children.sessions import kill_session
from .processes import clean_environment
from .serve_client import Endpoint, RefusedError, ServerError, get
from .serve_ways import SERVER, Setup, Split, Way, arguments, connector, environment, lmcache_server, split

_ERROR = re.compile(r"\b[A-Za-z]*(Error|Exception)\b.*:")
_GRACE = 10.0
_DYING = 3.0
"""Seconds within which a server that closed a connection is seen to be dead, if it is."""
_WORDS = 300


class Server:
    """A command that writes to a log of its own. A context manager: it and all that it started are gone after.

    It has a session of its own, so that Ctrl-C reaches the benchmark alone, which ends it; and it ends with the benchmark when
    that is killed.
    """

    def __init__(self, name: str, module: str, options: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
        self.name, self._log = name, folder / f"{name.replace(' ', '-')}.log"
        command = [sys.executable, "-m", "vcache.children.guard", str(os.getpid()), module, *options]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )

    def wait(self, ready: Callable[[], bool], timeout: float) -> None:
        """Return once it is `ready`. Raises `ServerError` when it ends, or takes longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            is_ready = ready()
            # Asked for afterwards: what a server says before it fails may look like being ready.
            if self._process.poll() is not None:
                raise ServerError(f"{self.name} did not start: {self._last_words()}")
            if is_ready:
                return
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} did not start within {timeout:.0f} s: {self._last_words()}")
            time.sleep(0.25)

    def death(self, within: float) -> str:
        """How it ended, waiting up to `within` seconds for its end; empty while it lives."""
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(within)
            return f"{self.name} ended with code {code}: {self._last_words()}"
        return ""

    def said(self, text: str) -> bool:
        """Whether its log contains this."""
        return text in self._log.read_text(errors="replace")

    def terminate(self) -> None:
        """Ask it to go (SIGTERM); does not wait. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()

    def close(self) -> None:
        """SIGTERM, then SIGKILL for it and what it started, if they do not go by themselves. Idempotent."""
        self.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        kill_session(self._process.pid)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _last_words(self) -> str:
        """The last error in its log, else the last line."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines[-200:] if _ERROR.search(line) and "root cause" not in line]
        return (errors or lines or ["it logged nothing"])[-1][:_WORDS]


@contextmanager
def started(
    way: Way, setup: Setup, timeout: float, logs: Path | None, progress: Callable[[str], None], run: int = 1
) -> Iterator[list[Endpoint]]:
    """Servers and services of one way; enters once all servers answer. `logs`: a folder that keeps their logs, with `run` in
    their names.

    Raises `VCacheError` when one does not start; a `ServerError` out of the block tells which server died, if one did.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vcache-bench-")))
        if logs is not None:
            stack.callback(_keep, folder, logs, f"{way}-{run}")
        memory = split(way, setup)
        address, port = "", 0
        if way == "vcache":
            progress("vcache: manager and lenders")
            address = _start_pool(stack, setup, memory, folder, timeout)
        elif way == "lmcache":
            progress("lmcache: its server")
            port = _start_lmcache(stack, setup, folder, timeout)
        transfer = connector(way, setup, address=address, port=port)
        servers: list[Server] = []
        endpoints = []
        for number in range(setup.instances):
            path = folder / f"{number}.sock"
            env = clean_environment(**environment(setup, number), VLLM_RPC_BASE_PATH=str(folder))
            env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over the size that is given
            options = arguments(setup, str(path), memory.engine, transfer)
            servers.append(stack.enter_context(Server(f"instance {number}", SERVER, options, folder, env)))
            endpoints.append(Endpoint.parse(f"unix://{path}"))
        for server in servers:  # all are asked to go before the first is waited for
            stack.callback(server.terminate)
        for server, endpoint in zip(servers, endpoints, strict=True):
            progress(f"{way}: waiting for {server.name}")
            server.wait(lambda endpoint=endpoint: _healthy(endpoint), timeout)  # type: ignore[misc]
        try:
            yield endpoints
        except RefusedError:
            raise
        except ServerError as error:
            deadline = time.monotonic() + _DYING
            dead = [text for server in servers if (text := server.death(max(0.0, deadline - time.monotonic())))]
            raise ServerError("; ".join(dead) or str(error)) from None


def _start_pool(stack: ExitStack, setup: Setup, memory: Split, folder: Path, timeout: float) -> str:
    """VCache's manager and lenders; the manager's address. What stands for VRAM on a CPU is host memory as well."""
    address = f"unix://{folder}/manager.sock"

    def start(name: str, ready: str, *options: str, **env: str) -> None:
        server = Server(name, "vcache.cli", options, folder, clean_environment(**env))
        stack.enter_context(server).wait(lambda: server.said(ready), timeout)

    def lend(name: str, kind: str, nbytes: int, *options: str, **env: str) -> None:
        start(name, "lending ", "lend", "--address", address, "--kind", kind, "--size", str(nbytes), *options, **env)

    start("manager", f"manager ready at {address}", "serve", "--address", address)
    host = memory.shared_host + (0 if setup.devices else memory.shared_vram)
    if host:
        lend("lender of host memory", "host", host)
    for device in setup.used_devices() if memory.shared_vram else ():
        lend(f"lender of GPU {device}", "cuda", memory.shared_vram, "--device", "0", CUDA_VISIBLE_DEVICES=device)
    return address


def _start_lmcache(stack: ExitStack, setup: Setup, folder: Path, timeout: float) -> int:
    port, http_port = _free_port(), _free_port()
    env = clean_environment(LMCACHE_TRACK_USAGE="false")
    server = Server("lmcache server", "vcache.bench.lmcache_command", lmcache_server(setup, port, http_port), folder, env)
    stack.enter_context(server).wait(lambda: _accepts(port), timeout)
    return port


def _healthy(endpoint: Endpoint) -> bool:
    try:
        asyncio.run(get(endpoint, "/health"))
    except ServerError:
        return False
    return True


def _keep(folder: Path, logs: Path, prefix: str) -> None:
    for log in folder.glob("*.log"):
        logs.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, logs / f"{prefix}-{log.name}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.3).close()
    except OSError:
        return False
    return True
