"""The lenders on other hosts, as this process reads from them: an engine and a guard for each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import TypeVar

from ..errors import SegmentError
from ..guard import Guard, start_thread
from ..segment.mapping import RemoteSlot
from ..segment.remote_engine import RemoteEngine
from ..segment.slots import HEADER_BYTES
from .buffers import SlotBuffer

logger = logging.getLogger("vcache.remote")

EngineFactory = Callable[[str], RemoteEngine]
"""Makes an engine that will read from this endpoint. Raises `VCacheError` or `OSError`."""

T = TypeVar("T")


class RemoteLender:
    """One lender, read by a transfer engine of its own. Thread-safe.

    Mooncake looks new endpoints up under a lock of the whole engine: a host that is gone would hold up the reads from all
    others. After failures nothing is read, until a read of one header in the background has succeeded.
    """

    def __init__(self, endpoint: str, engine: RemoteEngine, probe: SlotBuffer) -> None:
        """`probe`: takes headers that nobody looks at."""
        self.endpoint = endpoint
        self.engine = engine
        self._guard = Guard(_start)
        self._probe_buffer = probe
        self._lock = threading.Lock()
        self._running = 0

    @property
    def idle(self) -> bool:
        """Whether no call runs, not even one that was left behind."""
        return not self._running

    def usable(self, slot: RemoteSlot) -> bool:
        """Tell whether reads may be tried now. If not, and it is time, find out in the background whether `slot`'s header can
        be read. Does not block."""
        return self._guard.admits(lambda: self._probe(slot))

    def read(
        self, buffers: Sequence[SlotBuffer], targets: list[int], sources: list[int], sizes: list[int], until: float
    ) -> bool:
        """Read into `buffers`; whether all bytes are there. Blocks at most until `until` (by `time.monotonic`). After False
        bytes may still arrive, at any time until the engine's end: retire the buffers."""

        def start(work: Callable[[], T]) -> Future[T]:
            # In this thread: a call that is left behind must not register buffers after they were retired.
            if not all(self.engine.register(buffer.address, buffer.slab.nbytes) for buffer in buffers):
                raise SegmentError(f"buffers of {buffers[0].slab.nbytes} bytes cannot be registered")
            return _start(work)

        breaker = self._guard.breaker
        was_closed = breaker.state == "closed"
        try:
            self._guard.call(lambda: self._read(targets, sources, sizes), until, start)
        except Exception as error:  # noqa: BLE001 - a miss, whatever a binding raises
            if was_closed and breaker.state != "closed":
                logger.warning("memory lent at %s cannot be read: %s; its chunks are misses until it can", self.endpoint, error)
            return False
        return True

    def _probe(self, slot: RemoteSlot) -> None:
        buffer = self._probe_buffer
        self.engine.register(buffer.address, buffer.slab.nbytes)
        self._read([buffer.address], [slot.header], [HEADER_BYTES])
        logger.info("memory lent at %s can be read again", self.endpoint)

    def _read(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        with self._lock:
            self._running += 1
        try:
            code = self.engine.read(self.endpoint, targets, sources, sizes)
        finally:
            with self._lock:
                self._running -= 1
        if code:
            raise SegmentError(f"Mooncake error {code}")


class RemoteLenders:
    """All lenders on other hosts, each made when it is first read from. Thread-safe."""

    def __init__(self, make_engine: EngineFactory, alive: Callable[[], Collection[bytes]]) -> None:
        """`alive`: UUIDs of the segments that there are; the engines of all others are used again."""
        self._make_engine = make_engine
        self._alive = alive
        self._probe_buffer = SlotBuffer(HEADER_BYTES)
        self._lock = threading.Lock()
        self._lenders: dict[bytes, RemoteLender] = {}
        self._engines: list[tuple[RemoteEngine, dict[str, bytes]]] = []
        """With the endpoints that each has read from, and whose they were: Mooncake never forgets what it learnt about one."""

    def find(self, slot: RemoteSlot) -> RemoteLender:
        """Find the lender of `slot`. Takes milliseconds for a new one. Raises `VCacheError` or `OSError` when no engine can be
        made."""
        with self._lock:
            lender = self._lenders.get(slot.segment)
            if lender is None:
                self._forget_ended()
                engine = self._engine(slot)
                lender = self._lenders[slot.segment] = RemoteLender(slot.endpoint, engine, self._probe_buffer)
            return lender

    def retire(self, engine: RemoteEngine, buffers: Sequence[SlotBuffer]) -> None:
        """`engine` may still write to these buffers: keep them as long as it lives, and let no other write to them."""
        engine.retired += buffers
        with self._lock:
            engines = [known for known, _ in self._engines]
        for known in engines:
            for buffer in buffers:
                known.unregister(buffer.address)

    def close(self) -> None:
        """Let the engines go, each of which takes up to a second when no call uses it any more. Idempotent."""
        with self._lock:
            self._lenders, self._engines = {}, []

    def _engine(self, slot: RemoteSlot) -> RemoteEngine:
        """A new engine, or one that nobody uses. An engine's end would stop this process for a second."""
        used = {id(lender.engine) for lender in self._lenders.values()}
        for engine, endpoints in self._engines:
            if id(engine) not in used and endpoints.get(slot.endpoint, slot.segment) == slot.segment:
                endpoints[slot.endpoint] = slot.segment
                return engine
        engine = self._make_engine(slot.endpoint)
        self._engines.append((engine, {slot.endpoint: slot.segment}))
        return engine

    def _forget_ended(self) -> None:
        alive = self._alive()
        for uuid, lender in list(self._lenders.items()):
            if uuid not in alive and lender.idle:
                del self._lenders[uuid]


def _start(work: Callable[[], T], /) -> Future[T]:
    return start_thread("vcache-remote-call", work)
