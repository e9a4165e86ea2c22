"""The lenders on other hosts, as this process reads from them: an engine, a deadline and a circuit breaker for each."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from ..guard import CircuitBreaker
from ..segment.mapping import RemoteSlot
from ..segment.remote_engine import RemoteEngine
from ..segment.slots import HEADER_BYTES
from .remote_buffers import RemoteBuffer

logger = logging.getLogger("vcache.remote")

EngineFactory = Callable[[str], RemoteEngine]
"""Makes an engine that will read from this endpoint. Raises `VCacheError` or `OSError`."""

_COOLDOWN, _MAX_COOLDOWN = 0.5, 4.0
_FAILURES = 2


class Peer:
    """One lender. Thread-safe.

    It has an engine of its own, because Mooncake looks new endpoints up under a lock of the whole engine: a host that is gone
    would hold up the reads from all others. Calls run in threads of their own, so that one that outlasts its deadline is left
    behind; after failures none is made, until a read of one header in the background has succeeded.
    """

    def __init__(self, endpoint: str, engine: RemoteEngine, probe: RemoteBuffer) -> None:
        """`probe`: takes headers that nobody looks at."""
        self.endpoint = endpoint
        self.engine = engine
        self.breaker = CircuitBreaker(
            time.monotonic, threshold=_FAILURES, cooldown=_COOLDOWN, max_cooldown=_MAX_COOLDOWN, jitter=random.random
        )
        self._probe_buffer = probe
        self._lock = threading.Lock()
        self._running = 0
        self._probe: Future[int] | None = None

    @property
    def idle(self) -> bool:
        """Whether no call runs, not even one that was left behind."""
        return not self._running

    def usable(self, slot: RemoteSlot) -> bool:
        """Whether reads may be tried now. If not, and it is time, finds out in the background whether `slot`'s header can be
        read. Does not block."""
        if self.breaker.state == "closed":
            return True
        with self._lock:
            if (self._probe is None or self._probe.done()) and self.breaker.allow():
                self._probe = _in_thread(lambda: self._try(slot))
                self._probe.add_done_callback(self._probed)
        return False

    def _try(self, slot: RemoteSlot) -> int:
        buffer = self._probe_buffer
        self.engine.register(buffer.address, buffer.slab.nbytes)
        return self._call([buffer.address], [slot.header], [HEADER_BYTES])

    def read(
        self, buffers: Sequence[RemoteBuffer], targets: list[int], sources: list[int], sizes: list[int], until: float
    ) -> bool:
        """Read into `buffers`; whether all bytes are there. Blocks at most until `until` (by `time.monotonic`). After False
        bytes may still arrive, at any time until the engine's end: retire the buffers."""
        try:
            registered = all(self.engine.register(buffer.address, buffer.slab.nbytes) for buffer in buffers)
        except Exception as error:  # noqa: BLE001 - a miss, whatever a binding raises
            self._failed(str(error))
            return False
        if not registered:
            logger.warning("buffers of %d bytes cannot be registered for reads from other hosts", buffers[0].slab.nbytes)
            self.breaker.failure()
            return False
        call = _in_thread(lambda: self._call(targets, sources, sizes))
        try:
            code = call.result(max(0.0, until - time.monotonic()))
        except FutureTimeout:
            self._failed("no answer within the deadline", trip=True)
            return False
        except Exception as error:  # noqa: BLE001 - as above
            self._failed(str(error))
            return False
        if code:
            self._failed(f"Mooncake error {code}")
            return False
        self.breaker.success()
        return True

    def _call(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> int:
        with self._lock:
            self._running += 1
        try:
            return self.engine.read(self.endpoint, targets, sources, sizes)
        finally:
            with self._lock:
                self._running -= 1

    def _failed(self, problem: str, *, trip: bool = False) -> None:
        was_closed = self.breaker.state == "closed"
        if trip:
            self.breaker.trip()
        else:
            self.breaker.failure()
        if was_closed and self.breaker.state != "closed":
            logger.warning("memory lent at %s cannot be read: %s; its chunks are misses until it can", self.endpoint, problem)

    def _probed(self, probe: Future[int]) -> None:
        if probe.exception() is not None or probe.result():
            self.breaker.failure()
        else:
            self.breaker.success()
            logger.info("memory lent at %s can be read again", self.endpoint)


class Peers:
    """All peers, made when they are first read from. Thread-safe."""

    def __init__(self, make_engine: EngineFactory) -> None:
        self._make_engine = make_engine
        self._probe_buffer = RemoteBuffer(0)
        self._lock = threading.Lock()
        self._peers: dict[bytes, Peer] = {}
        self._engines: list[tuple[RemoteEngine, dict[str, bytes]]] = []
        """With the endpoints that each has read from, and whose they were: Mooncake never forgets what it learnt about one."""

    def find(self, slot: RemoteSlot, alive: Callable[[], Collection[bytes]]) -> Peer:
        """The peer that lends `slot`. `alive`: UUIDs of the segments that there are; what others used is used again. Takes
        milliseconds for a new one. Raises `VCacheError` or `OSError` when no engine can be made."""
        with self._lock:
            peer = self._peers.get(slot.segment)
            if peer is None:
                self._forget(alive())
                engine = self._engine(slot)
                peer = self._peers[slot.segment] = Peer(slot.endpoint, engine, self._probe_buffer)
            return peer

    def retire(self, engine: RemoteEngine, buffers: Sequence[RemoteBuffer]) -> None:
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
            self._peers, self._engines = {}, []

    def _engine(self, slot: RemoteSlot) -> RemoteEngine:
        """A new engine, or one that nobody uses. An engine's end would stop this process for a second."""
        used = {id(peer.engine) for peer in self._peers.values()}
        for engine, endpoints in self._engines:
            if id(engine) not in used and endpoints.get(slot.endpoint, slot.segment) == slot.segment:
                endpoints[slot.endpoint] = slot.segment
                return engine
        engine = self._make_engine(slot.endpoint)
        self._engines.append((engine, {slot.endpoint: slot.segment}))
        return engine

    def _forget(self, alive: Collection[bytes]) -> None:
        for uuid, peer in list(self._peers.items()):
            if uuid not in alive and peer.idle:
                del self._peers[uuid]


def _in_thread(work: Callable[[], int]) -> Future[int]:
    """Run `work` in a daemon thread: one that is stuck does not hold up the end of the process."""
    future: Future[int] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
            future.set_exception(error)
        else:
            future.set_result(result)

    try:
        threading.Thread(target=run, name="vcache-remote-call", daemon=True).start()
    except RuntimeError as error:  # no thread to be had
        future.set_exception(error)
    return future
