"""What all sessions share: who is connected, what the directory instructs, answers that come later, the clock."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from ...config import ManagerConfig
from ...errors import ManagerRefusedError, VCacheError
from .. import wire
from ..api import WIPE_TIMEOUT, Goodbye, Push, StatsReply, Verb
from ..directory.directory import Directory
from ..directory.jobs import Job
from ..directory.removal import RemovalReply
from .strangers import Budget, LogThrottle

logger = logging.getLogger("vcache.manager")

_SHORTEST_TICK = 0.01
MAX_STRANGERS = 256
"""Connections before hello. Beyond it the oldest of them is closed, so that newcomers get in."""
MAX_UNFINISHED = 2**28
"""Bytes of frames of which the rest has not come, of all connections together. Beyond it, whoever is oldest at it is closed."""
_WORK_SECONDS = 0.001
"""How long the directory's jobs go on before whoever else waits is served."""


OWED = object()
"""In place of a reply that comes later."""


class Connection(Protocol):
    """One of them (`session.Session`)."""

    client: bytes
    """Empty without a session."""

    def push(self, push: Push) -> None: ...

    def answer(self, request: int, reply: object) -> None:
        """Send the reply to an earlier request."""

    def refuse(self, request: int, error: Exception) -> None:
        """Send what an earlier request failed with."""

    def reject(self, reason: VCacheError) -> None:
        """Close for a fault of the other side."""

    def close(self, reason: VCacheError) -> None:
        """Say why, and close."""


class _Owed:
    """An answer that comes later: once a job is done, or once lenders have wiped what it speaks of."""

    __slots__ = ("connection", "reply", "request", "timer", "tokens", "verb")

    def __init__(
        self, connection: Connection, request: int, verb: Verb[Any], reply: object, tokens: Sequence[int] = ()
    ) -> None:
        self.connection = connection
        self.request = request
        self.verb = verb
        self.reply = reply
        """The job, or the reply that is held back until the wipes of `tokens` are over."""
        self.tokens = tokens
        self.timer: asyncio.TimerHandle | None = None


class Sessions:
    """The directory as a service. Everything runs on one loop; nothing blocks."""

    def __init__(
        self, config: ManagerConfig, directory: Directory, token: bytes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`token`: what clients must present; empty when none is needed."""
        self.token = token
        self.max_frame = int(config.max_frame)
        self.session_timeout = config.session_timeout
        self.directory = directory
        self.clock = clock
        self.log_throttle = LogThrottle(clock)
        self._connections: set[Connection] = set()
        self._strangers: Budget[Connection] = Budget(MAX_STRANGERS)
        self._unfinished: Budget[Connection] = Budget(MAX_UNFINISHED)
        self._clients: dict[bytes, Connection] = {}
        """By client id: who has a session."""
        self._gone = asyncio.Event()
        self._last_seen = clock()
        self._owed: dict[_Owed, None] = {}
        self._working: asyncio.Handle | None = None
        self._counters: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        # No call creates a deadline nearer than this, so a timer that is never set further ahead need not be moved by calls.
        nearest = min(config.lease_ttl, config.ticket_ttl, config.quarantine, config.session_timeout)
        self._longest_tick = max(nearest, _SHORTEST_TICK)

    # -- connections -------------------------------------------------------------------------------------------------

    def hello(self, connection: Connection, hello: wire.Hello) -> wire.HelloReply:
        """Begin a session. An older one of the same client is over, and its connection is closed."""
        session = self.directory.open_session(
            hello.client, hello.name, hello.role, self.clock(), host=hello.host, remote=hello.remote
        )
        self._strangers.set(connection, 0)
        before = self._clients.get(hello.client)
        self._clients[hello.client] = connection
        if before is not None:
            before.client = b""
            before.close(ManagerRefusedError("this client connected again"))
        logger.info("%s connected as %s %s", connection, hello.role, hello.client.hex())
        return wire.HelloReply(session, self.max_frame)

    def came(self, connection: Connection) -> None:
        """Somebody connected, and has not said hello."""
        self._connections.add(connection)
        for oldest in self._strangers.set(connection, 1):
            oldest.reject(ManagerRefusedError("too many connections that do not say hello"))

    def waits(self, connection: Connection, nbytes: int) -> None:
        """So many bytes of a frame have come, and its rest has not."""
        for oldest in self._unfinished.set(connection, nbytes):
            oldest.reject(ManagerRefusedError("too many requests of all clients together are sent in part only"))

    def gone(self, connection: Connection) -> None:
        """The connection is lost, and with it its session if it still has one."""
        self._connections.discard(connection)
        self._strangers.set(connection, 0)
        self._unfinished.set(connection, 0)
        self._last_seen = self.clock()
        self._gone.set()
        if self._clients.get(connection.client) is connection:
            del self._clients[connection.client]
            self.directory.close_session(connection.client, self.clock())
            logger.info("%s disconnected", connection)
            self.settle()

    def idle(self) -> float:
        """Seconds since anybody was connected; 0 while somebody is."""
        return 0.0 if self._connections else self.clock() - self._last_seen

    def count(self, counter: str) -> None:
        self._counters[counter] += 1

    def stats(self) -> StatsReply:
        """The directory's, and what was counted and is connected here."""
        return self._with_ours(self.directory.stats(self.clock()))

    def _with_ours(self, stats: StatsReply) -> StatsReply:
        ours = {name: self._counters[name] for name in ("connections_rejected", "slow_peers", "internal_errors")}
        gauges = {**stats.gauges, "connections": len(self._connections)}
        return msgspec.structs.replace(stats, counters={**stats.counters, **ours}, gauges=gauges)

    # -- answers -----------------------------------------------------------------------------------------------------

    def finish(self, connection: Connection, request: int, verb: Verb[Any], reply: object) -> object:
        """The reply to what the directory answered; `OWED` when it comes later. Raises what a job raised."""
        if isinstance(reply, Job):
            if not reply.done:
                self._owed[_Owed(connection, request, verb, reply)] = None
                return OWED
            reply = reply.result()
        if isinstance(reply, RemovalReply):
            if self.directory.outstanding(reply.tokens):
                held = _Owed(connection, request, verb, reply.removed, reply.tokens)
                held.timer = asyncio.get_running_loop().call_later(WIPE_TIMEOUT, self._pay, held)
                self._owed[held] = None
                return OWED
            return reply.removed
        if isinstance(reply, StatsReply):
            return self._with_ours(reply)
        if isinstance(verb, Goodbye):
            del self._clients[connection.client]
            connection.client = b""
        return reply

    def _pay(self, owed: _Owed) -> None:
        """Answer now."""
        del self._owed[owed]
        if owed.timer is not None:
            owed.timer.cancel()
        try:
            reply = self.finish(owed.connection, owed.request, owed.verb, owed.reply)
            if reply is not OWED:
                owed.connection.answer(owed.request, reply)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong, it is this request that failed
            owed.connection.refuse(owed.request, error)

    def _is_due(self, owed: _Owed) -> bool:
        return owed.reply.done if isinstance(owed.reply, Job) else not self.directory.outstanding(owed.tokens)

    # -- pushes and time ---------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """After events: carry out what the directory instructs, and see that it is called again in time."""
        for target, push in self.directory.take_instructions():
            if push is None:
                self._session_over(target)
            elif target is None:
                for connection in list(self._clients.values()):
                    connection.push(push)
            elif target in self._clients:
                self._clients[target].push(push)
        if self._owed:
            for owed in [owed for owed in self._owed if self._is_due(owed)]:
                self._pay(owed)
        if self._timer is None:
            self._arm()
        if self._working is None and self.directory.has_work:
            self._working = asyncio.get_running_loop().call_soon(self._work)

    def close(self) -> None:
        """Close every connection and stop the clock."""
        for connection in list(self._connections):
            connection.close(ManagerRefusedError("the manager stops"))
        for handle in (self._timer, self._working, *(owed.timer for owed in self._owed)):
            if handle is not None:
                handle.cancel()

    async def closed(self) -> None:
        """Return when every connection is gone."""
        while self._connections:
            self._gone.clear()
            await self._gone.wait()

    def _session_over(self, client: bytes | None) -> None:
        """The directory ended a session because the client was silent."""
        connection = self._clients.pop(client, None) if client is not None else None
        if connection is not None:
            connection.client = b""
            logger.warning("session of %s ended: no sign of life for %g s", connection, self.session_timeout)
            connection.close(ManagerRefusedError(f"no sign of life for {self.session_timeout:g} s"))

    def _work(self) -> None:
        """Go on with the directory's jobs for a moment; then it is the others' turn."""
        self._working = None
        end = time.perf_counter() + _WORK_SECONDS
        self.directory.work(self.clock())
        while self.directory.has_work and time.perf_counter() < end:
            self.directory.work(self.clock())
        self.settle()

    def _arm(self) -> None:
        due = self.directory.next_deadline()
        if due is not None:
            delay = min(max(due - self.clock(), _SHORTEST_TICK), self._longest_tick)
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.directory.tick(self.clock())
        self.settle()
