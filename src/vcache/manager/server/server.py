"""The manager process: one loop, one directory, one listening socket."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ...config import VCacheConfig
from ...errors import ConfigError
from ...segment.hostinfo import raise_file_limit
from ..address import load_token, parse_address
from ..api import StatsReply
from ..directory.directory import Directory, random_first_segment
from .exporter import Exporter
from .listen import ListeningSocket, listen
from .session import Session
from .sessions import Sessions

logger = logging.getLogger("vcache.manager")

_SCRAPE_TIMEOUT = 2.0
_STOP_TIMEOUT = 2.0


class ManagerServer:
    """A manager on the running loop. `start`, then `stop`; not reusable. Leaves signals and the garbage collector alone."""

    def __init__(self, config: VCacheConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds, never backwards. Raises `ConfigError` for an address or token that cannot serve."""
        self._config = config.manager
        self._address = parse_address(self._config.address)
        token = load_token(self._config) if self._address.kind == "tcp" else b""
        if self._address.kind == "tcp" and not token:
            raise ConfigError(
                f"manager.address: {self._address}: TCP needs a shared secret; write one into a file and set "
                "manager.token_file, or set VCACHE_TOKEN (for one host, unix:///path needs none)"
            )
        self._directory = Directory(self._config, epoch=time.time_ns() & ~1, now=clock(), first_segment=random_first_segment())
        self._sessions = Sessions(self._config, self._directory, token, clock)
        self._socket: ListeningSocket | None = None
        self._server: asyncio.Server | None = None
        self._exporter: Exporter | None = None

    @property
    def address(self) -> str:
        """Where it listens; with the real port once started."""
        return str(self._socket.address if self._socket is not None else self._address)

    @property
    def metrics_port(self) -> int:
        """Port of the Prometheus endpoint; 0 without one."""
        return self._exporter.port if self._exporter is not None else 0

    def stats(self) -> StatsReply:
        """Call it on the loop's thread."""
        return self._sessions.stats()

    def check_integrity(self) -> None:
        """For tests, on the loop's thread. Raises `IntegrityError` naming the rule that does not hold."""
        self._directory.check_integrity()

    async def start(self) -> None:
        """Listen. Raises `AddressInUseError` when another manager has the address, `ConfigError` when it cannot be had."""
        loop = asyncio.get_running_loop()
        self._socket = await asyncio.to_thread(listen, self._address)
        try:
            make = loop.create_unix_server if self._address.kind == "unix" else loop.create_server
            self._server = await make(lambda: Session(self._sessions), sock=self._socket.socket)
            if self._config.metrics_port:
                self._exporter = Exporter(self._config.metrics_host, self._config.metrics_port, lambda: self._scrape(loop))
        except BaseException:
            await self.stop()
            raise
        logger.info("manager serves %s", self.address)

    async def stop(self) -> None:
        """Close every connection and the socket, and remove the socket's file. Idempotent; takes two seconds at most."""
        if self._exporter is not None:
            await asyncio.to_thread(self._exporter.close)
            self._exporter = None
        if self._server is not None:
            self._server.close()
            self._server = None
        self._sessions.close()
        with suppress(TimeoutError):  # They are aborted before; whoever is still there then is let go.
            await asyncio.wait_for(self._sessions.closed(), _STOP_TIMEOUT)
        if self._socket is not None:
            self._socket.close()
            logger.info("manager at %s stopped", self.address)

    async def idle_for(self, seconds: float) -> None:
        """Return once nobody has been connected for so long."""
        while (rest := seconds - self._sessions.idle()) > 0:
            await asyncio.sleep(rest)

    def _scrape(self, loop: asyncio.AbstractEventLoop) -> StatsReply:
        """For the HTTP thread: statistics are taken on the loop."""

        async def take() -> StatsReply:
            return self._sessions.stats()

        return asyncio.run_coroutine_threadsafe(take(), loop).result(_SCRAPE_TIMEOUT)


def run_server(config: VCacheConfig, *, ready: Callable[[str], None] | None = None, idle_exit: float = 0.0) -> bool:
    """Serve until SIGINT or SIGTERM, or, when `idle_exit` is above 0, until nobody has been connected for so many seconds:
    then the answer is False. Stops cleanly. Blocks; for the main thread of a process of its own.

    `ready` is called once with the address when clients can connect. Raises `ConfigError` and `AddressInUseError` before.
    """
    import uvloop

    raise_file_limit()
    stopped: bool = uvloop.run(_serve(config, ready, idle_exit))
    return stopped


async def _serve(config: VCacheConfig, ready: Callable[[str], None] | None, idle_exit: float) -> bool:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    server = ManagerServer(config)
    await server.start()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopping.set)
        _spare_the_collector()
        if ready is not None:
            ready(server.address)
        waits: list[asyncio.Task[Any]] = [loop.create_task(stopping.wait())]
        if idle_exit:
            waits.append(loop.create_task(server.idle_for(idle_exit)))
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        return stopping.is_set()
    finally:
        await server.stop()


def _spare_the_collector() -> None:
    """The directory holds millions of objects and no cycles: looking through all of them again and again would only cost tail
    latency. Young objects, where the cycles of connections and exceptions are, are still collected, few at a time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 2, 1_000_000)
