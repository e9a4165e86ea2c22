"""Between the peers and the directory: sessions, verbs, pushes, answers that wait for lenders, and the directory's clock."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from ...config import ManagerConfig
from ...errors import ManagerRefusedError, VCacheError
from ...segment.slots import SlabInventory
from .. import wire
from ..api import StatsReply
from ..directory.directory import Directory
from ..directory.jobs import Job
from .peer import Peer
from .strangers import Budget, LogThrottle

logger = logging.getLogger("vcache.manager")

_INVENTORY_BYTES = 2**28
"""Bytes of inventory parts that one connection may have pending."""
_SHORTEST_TICK = 0.01
MAX_STRANGERS = 256
"""Connections before hello. Beyond it the oldest of them is closed, so that newcomers get in."""
MAX_UNFINISHED = 2**28
"""Bytes of frames of which the rest has not come, of all connections together. Beyond it, whoever is oldest at it is closed."""
_WORK_SECONDS = 0.001
"""How long the directory's jobs go on before whoever else waits is served."""


class _Promise(NamedTuple):
    """A request that is answered when a job is done."""

    peer: Peer
    request: int
    job: Job[Any]


class _Held:
    """An answer held back until lenders have wiped what it speaks of."""

    __slots__ = ("answer", "peer", "request", "timer", "tokens")

    def __init__(self, peer: Peer, request: int, answer: bytes, tokens: list[int]) -> None:
        self.peer = peer
        self.request = request
        self.answer = answer
        self.tokens = tokens
        self.timer: asyncio.TimerHandle | None = None


class Service:
    """The directory as a service. Everything runs on one loop; nothing blocks."""

    def __init__(
        self, config: ManagerConfig, directory: Directory, token: bytes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`token`: what clients must present; empty when none is needed."""
        self.token = token
        self.max_frame = int(config.max_frame)
        self.session_timeout = config.session_timeout
        self.peers: set[Peer] = set()
        self.log_throttle = LogThrottle(clock)
        self._strangers: Budget[Peer] = Budget(MAX_STRANGERS)
        self._unfinished: Budget[Peer] = Budget(MAX_UNFINISHED)
        self._directory = directory
        self._clock = clock
        self._sessions: dict[bytes, Peer] = {}
        self._gone = asyncio.Event()
        self._last_seen = clock()
        self._parts: dict[Peer, list[wire.InventoryPart]] = {}
        self._held: set[_Held] = set()
        self._promises: list[_Promise] = []
        self._working: asyncio.Handle | None = None
        self._counters: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        # No call creates a deadline nearer than this, so a timer that is never set further ahead need not be moved by calls.
        nearest = min(config.lease_ttl, config.ticket_ttl, config.quarantine, config.session_timeout)
        self._longest_tick = max(nearest, _SHORTEST_TICK)

    # -- sessions ----------------------------------------------------------------------------------------------------

    def hello(self, peer: Peer, hello: wire.Hello) -> bytes:
        """Begin a session. An older one of the same client is over, and its connection is closed."""
        session = self._directory.open_session(
            hello.client, hello.name, hello.role, self._clock(), host=hello.host, remote=hello.remote
        )
        self._strangers.set(peer, 0)
        before = self._sessions.get(hello.client)
        self._sessions[hello.client] = peer
        if before is not None:
            before.client = b""
            before.close(ManagerRefusedError("this client connected again"))
        logger.info("%s connected as %s %s", peer, hello.role, hello.client.hex())
        return wire.encode_reply(wire.HelloReply(session, self.max_frame))

    def peer_came(self, peer: Peer) -> None:
        """Somebody connected, and has not said hello."""
        self.peers.add(peer)
        for oldest in self._strangers.set(peer, 1):
            oldest.reject(ManagerRefusedError("too many connections that do not say hello"))

    def peer_waits(self, peer: Peer, nbytes: int) -> None:
        """So many bytes of a frame have come, and its rest has not."""
        for oldest in self._unfinished.set(peer, nbytes):
            oldest.reject(ManagerRefusedError("too many requests of all clients together are sent in part only"))

    def peer_gone(self, peer: Peer) -> None:
        """Its connection is lost, and with it its session if it still has one."""
        self.peers.discard(peer)
        self._strangers.set(peer, 0)
        self._unfinished.set(peer, 0)
        self._last_seen = self._clock()
        self._gone.set()
        self._parts.pop(peer, None)
        if self._sessions.get(peer.client) is peer:
            del self._sessions[peer.client]
            self._directory.close_session(peer.client, self._clock())
            logger.info("%s disconnected", peer)
            self.settle()

    def idle(self) -> float:
        """Seconds since anybody was connected; 0 while somebody is."""
        return 0.0 if self.peers else self._clock() - self._last_seen

    def count(self, counter: str) -> None:
        self._counters[counter] += 1

    # -- verbs -------------------------------------------------------------------------------------------------------

    def lookup(self, client: bytes, keys: Sequence[bytes]) -> bytes:
        return wire.encode_count(self._directory.lookup(client, keys, self._clock()))

    def acquire(self, client: bytes, keys: Sequence[bytes], shard: int, lease: int) -> bytes:
        return wire.encode_acquired(*self._directory.acquire_packed(client, keys, shard, lease, self._clock()))

    def release(self, client: bytes, lease: int) -> None:
        self._directory.release(client, lease, self._clock())

    def call(self, peer: Peer, number: int, request: wire.Request) -> bytes | None:
        """Payload of the answer, or None when it comes later. Raises what the directory raises."""
        directory, now = self._directory, self._clock()
        job: Job[Any]
        match request:
            case wire.Mount(info, inventory, gate):
                job = directory.begin_mount(peer.client, info, [*self._take_parts(peer, info.uuid), *inventory], now, gate)
            case wire.PutStart(put):
                job = directory.begin_put_start(peer.client, put, now)
            case wire.Tiers(keys):
                job = directory.begin_tiers(peer.client, keys, now)
            case wire.Remove(keys):
                job = directory.begin_remove(peer.client, keys, now)
            case wire.Clear(namespace):
                job = directory.begin_clear(peer.client, namespace, now)
            case _:
                return wire.encode_reply(self._perform(peer, request))
        promise = _Promise(peer, number, job)
        if job.done:
            return self._result(promise)
        self._promises.append(promise)
        return None

    def _perform(self, peer: Peer, request: wire.Request) -> object:
        """The verb's result; None for those that have none."""
        directory, client, now = self._directory, peer.client, self._clock()
        match request:
            case wire.PutEnd(tickets):
                return directory.put_end(client, tickets, now)
            case wire.Demote(nbytes, avoid):
                return directory.demote(client, nbytes, avoid, now)
            case wire.PlanSpill(nbytes, avoid):
                return directory.spill(client, nbytes, avoid, now)
            case wire.DropSlabs(uuid, nbytes):
                return directory.drop_slabs(client, uuid, nbytes, now)
            case wire.Segments():
                return directory.segments()
            case wire.Stats():
                return self.stats()
            case _:
                self._obey(peer, request, client, now)
                return None

    def _obey(self, peer: Peer, request: wire.Request, client: bytes, now: float) -> None:
        directory = self._directory
        match request:
            case wire.Heartbeat():
                directory.heartbeat(client, now)
            case wire.PutRevoke(tickets):
                directory.put_revoke(client, tickets, now)
            case wire.Spilled(lease, keys):
                directory.spilled(client, lease, keys, now)
            case wire.Unmount(uuid):
                directory.unmount(client, uuid, now)
            case wire.AddSlabs(uuid, slabs):
                directory.add_slabs(client, uuid, slabs, now)
            case wire.ImporterGone(uuid, importer):
                directory.importer_gone(client, uuid, importer, now)
            case wire.WritersLeft(uuid, writers):
                directory.writers_left(client, uuid, writers, now)
            case wire.RequestResize(uuid, nbytes):
                directory.request_resize(client, uuid, nbytes, now)
            case wire.InventoryPart():
                self._inventory_part(peer, request)
            case wire.Wiped(token):
                directory.wiped(client, token, now)
            case wire.Goodbye():
                del self._sessions[client]
                directory.close_session(client, now, goodbye=True)
                peer.client = b""
            case _:
                raise ManagerRefusedError(f"no such verb: {type(request).__name__}")

    # -- answers that come later -------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Go on with the directory's jobs for a moment; then it is the others' turn."""
        self._working = None
        end = time.perf_counter() + _WORK_SECONDS
        self._directory.work(self._clock())
        while self._directory.has_work and time.perf_counter() < end:
            self._directory.work(self._clock())
        self.settle()

    def _answer_done(self) -> None:
        done = [promise for promise in self._promises if promise.job.done]
        self._promises = [promise for promise in self._promises if not promise.job.done]
        for promise in done:
            try:
                answer = self._result(promise)
            except VCacheError as error:
                promise.peer.refuse(promise.request, error)
            except Exception:
                logger.exception("a request of %s failed inside the manager", promise.peer)
                promise.peer.refuse(promise.request, self.failure())
            else:
                if answer is not None:
                    promise.peer.reply(promise.request, answer)

    def _result(self, promise: _Promise) -> bytes | None:
        """The answer that a job came to, or None if it must wait for lenders. Raises what the job raised."""
        result = promise.job.result()
        if not isinstance(result, tuple):
            return wire.encode_reply(result)
        removed, tokens = result
        answer = wire.encode_reply(removed)
        if not self._directory.outstanding(tokens):
            return answer
        held = _Held(promise.peer, promise.request, answer, tokens)
        held.timer = asyncio.get_running_loop().call_later(wire.WIPE_TIMEOUT, self._answer, held)
        self._held.add(held)
        return None

    def failure(self) -> VCacheError:
        """What a client is told at whose request the manager failed; counts it."""
        self.count("internal_errors")
        return ManagerRefusedError("the manager failed at this request; its log has the details")

    def _answer_held(self) -> None:
        for held in [held for held in self._held if not self._directory.outstanding(held.tokens)]:
            self._answer(held)

    def _answer(self, held: _Held) -> None:
        self._held.discard(held)
        if held.timer is not None:
            held.timer.cancel()
        held.peer.reply(held.request, held.answer)

    # -- inventories and statistics ----------------------------------------------------------------------------------

    def _inventory_part(self, peer: Peer, part: wire.InventoryPart) -> None:
        parts = self._parts.setdefault(peer, [])
        parts.append(part)
        if sum(len(slab.slot_headers) for each in parts for slab in each.slabs) > _INVENTORY_BYTES:
            del self._parts[peer]
            raise ManagerRefusedError(f"mount: an inventory has at most {_INVENTORY_BYTES} bytes")

    def _take_parts(self, peer: Peer, uuid: bytes) -> list[SlabInventory]:
        parts = self._parts.pop(peer, [])
        return [slab for part in parts if part.uuid == uuid for slab in part.slabs]

    def stats(self) -> StatsReply:
        """The directory's, and what was counted and is connected here."""
        stats = self._directory.stats(self._clock())
        ours = {name: self._counters[name] for name in ("connections_rejected", "slow_peers", "internal_errors")}
        gauges = {**stats.gauges, "connections": len(self.peers)}
        return msgspec.structs.replace(stats, counters={**stats.counters, **ours}, gauges=gauges)

    # -- pushes and time ---------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """After events: carry out what the directory instructs, and see that it is called again in time."""
        for target, push in self._directory.take_instructions():
            if push is None:
                self._session_over(target)
            elif target is None:
                for peer in list(self._sessions.values()):
                    peer.push(push)
            elif target in self._sessions:
                self._sessions[target].push(push)
        if self._promises:
            self._answer_done()
        if self._held:
            self._answer_held()
        if self._timer is None:
            self._arm()
        if self._working is None and self._directory.has_work:
            self._working = asyncio.get_running_loop().call_soon(self._work)

    def close(self) -> None:
        """Close every connection and stop the clock."""
        for peer in list(self.peers):
            peer.close(ManagerRefusedError("the manager stops"))
        for held in self._held:
            if held.timer is not None:
                held.timer.cancel()
        for handle in (self._timer, self._working):
            if handle is not None:
                handle.cancel()

    async def closed(self) -> None:
        """Return when every connection is gone."""
        while self.peers:
            self._gone.clear()
            await self._gone.wait()

    def _session_over(self, client: bytes | None) -> None:
        """The directory ended a session because the client was silent."""
        peer = self._sessions.pop(client, None) if client is not None else None
        if peer is not None:
            peer.client = b""
            logger.warning("session of %s ended: no sign of life for %g s", peer, self.session_timeout)
            peer.close(ManagerRefusedError(f"no sign of life for {self.session_timeout:g} s"))

    def _arm(self) -> None:
        due = self._directory.next_deadline()
        if due is not None:
            delay = min(max(due - self._clock(), _SHORTEST_TICK), self._longest_tick)
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._directory.tick(self._clock())
        self.settle()
