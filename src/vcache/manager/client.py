"""`ManagerClient`: a manager in another process, reached over one socket that comes back by itself."""

from __future__ import annotations

import logging
import os
import random
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from ..config import ManagerConfig
from ..errors import DeadlineExceededError, ManagerUnavailableError, ProtocolError, VCacheError
from ..guard import CircuitBreaker
from ..segment.slots import HEADER_BYTES, SegmentInfo, SlabInfo, SlabInventory
from . import wire
from .address import load_token, parse_address
from .api import (
    AcquireReply,
    GateReport,
    GateWriter,
    Listener,
    MovePlan,
    PutGrant,
    PutRequest,
    Role,
    SpillPlan,
    StatsReply,
    Ticket,
)
from .listeners import Audience, Dispatcher
from .socket_transport import Connection, Late, NotSentError

logger = logging.getLogger("vcache.manager")

T = TypeVar("T")
_GATE_TIMEOUT = 1.0
_GATE_PATIENCE = 5.0
_MISSES = 3
"""Consecutive deadline misses after which the connection counts as dead."""
_SECONDS_PER_HEADER = 2e-4
"""What a mount may take for each slot: about twenty times what it takes while nobody else wants anything of the manager."""
_CLEAR_TIMEOUT = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0


class ManagerClient:
    """`Manager` over a unix or TCP socket. Thread-safe.

    Three daemon threads: one connects and reads, one sends heartbeats, one calls the listeners. Without a connection every
    call raises `ManagerUnavailableError` at once; the connection is retried in the background, with pauses that double up to
    5 s. Three deadlines missed in a row close the connection. Numbers (leases, segments) belong to one session: a reply
    that arrives across a reconnect is never returned.

    Not usable in a forked child: there every call raises `ManagerUnavailableError`, and the parent's session is unharmed.
    """

    def __init__(
        self,
        config: ManagerConfig,
        *,
        client_id: bytes | None = None,
        name: str = "",
        role: Role = "engine",
        token: bytes | None = None,
        host: str = "",
        remote: bool = False,
    ) -> None:
        """Start connecting to `config.address` and return at once. `client_id`: 16 bytes, random by default. `host`,
        `remote`: as in `wire.Hello`.

        `token` defaults to `load_token(config)` for TCP. Raises `ConfigError` for a bad address or token file.
        """
        self._config = config
        self._address = parse_address(config.address)
        if token is None:
            token = load_token(config) if self._address.kind == "tcp" else b""
        self._hello = wire.Hello(client_id or secrets.token_bytes(16), name[:256], role, token, host, remote)
        self._breaker = CircuitBreaker(
            time.monotonic, threshold=_MISSES, cooldown=_FIRST_PAUSE, max_cooldown=_LONGEST_PAUSE, jitter=random.random
        )
        self._dispatcher = Dispatcher("vcache-manager-events")
        self._audience = Audience(self._dispatcher)
        self._gate: Callable[[float], bool] | None = None
        self._changed = threading.Condition()
        self._connection: Connection | None = None
        self._failure: VCacheError | None = None
        self._closing = threading.Event()
        self._pid = os.getpid()
        _close_in_forked_child(self)
        self._threads = [
            threading.Thread(target=self._stay_connected, name="vcache-manager-io", daemon=True),
            threading.Thread(target=self._beat, name="vcache-manager-heartbeat", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # -- session ---------------------------------------------------------------------------------------------------

    @property
    def client_id(self) -> bytes:
        return self._hello.client

    @property
    def epoch(self) -> int:
        connection = self._connection
        return connection.session.epoch if connection is not None else 0

    @property
    def last_failure(self) -> VCacheError | None:
        """Why there is no session, as far as is known; None with one. `ManagerRefusedError` and `ProtocolError` will stay."""
        return self._failure

    def wait_connected(self, timeout: float) -> bool:
        """Block until there is a session, at most `timeout` seconds. Returns early, with False, when the manager refuses."""
        with self._changed:
            self._changed.wait_for(lambda: self._connection is not None or self._closing.is_set() or self._refused(), timeout)
            return self._connection is not None

    def set_write_gate(self, wait_idle: Callable[[float], bool]) -> None:
        self._gate = wait_idle

    def subscribe(self, listener: Listener) -> None:
        self._check_process()
        self._audience.subscribe(listener)

    def close(self) -> None:
        if os.getpid() != self._pid or self._closing.is_set():
            return
        deadline = time.monotonic() + self._config.deadline
        connection = self._connection
        self._closing.set()
        try:
            if connection is not None and not self._idle_gate(self._config.deadline / 2):
                # Goodbye would promise that nothing is being written. Without it the slots wait until the lenders see us gone.
                logger.warning("closed while writes are in flight; their slots stay reserved until these end")
            elif connection is not None:
                connection.call(wire.CALL, wire.encode_request(wire.Goodbye()), self._config.deadline / 2)
        except VCacheError as error:
            logger.debug("goodbye to the manager: %s", error)
        if connection is not None:
            connection.shut("closed by this client")
        with self._changed:
            self._changed.notify_all()
        self._dispatcher.close(max(0.0, deadline - time.monotonic()))
        for thread in self._threads if connection is not None and not self._dispatcher.is_current() else ():
            # Without a session they may be in the middle of a hello; they end by themselves when it does.
            thread.join(max(0.0, deadline - time.monotonic()))

    # -- verbs -----------------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> int:
        return wire.decode_count(self._call(wire.LOOKUP, wire.join_keys(keys)))

    def acquire(self, keys: Sequence[bytes], shard: int = 0, *, lease: int = 0) -> AcquireReply:
        connection = self._live()
        number = _lease_number(lease, connection)
        if lease and not number:
            return AcquireReply(0, 0.0, [])  # Of an earlier manager: it covers nothing.
        payload = wire.encode_acquire(wire.join_keys(keys), shard, number)
        late = None if lease else self._late_lease
        answer = wire.decode_acquired(self._call(wire.ACQUIRE, payload, late=late, connection=connection))
        return answer._replace(lease=_public_lease(answer.lease, connection))

    def release(self, lease: int) -> None:
        """Also returns quietly without a session: its end has ended the lease."""
        self._check_process()
        connection = self._connection
        number = _lease_number(lease, connection) if connection is not None else 0
        if connection is None or not number:
            return
        try:
            connection.send(wire.RELEASE, wire.encode_lease(number), self._config.deadline)
        except ManagerUnavailableError as error:
            logger.debug("release: %s", error)

    def put_start(self, request: PutRequest) -> list[PutGrant]:
        return self._ask(wire.PutStart(request), wire.GRANTS_REPLY, late=lambda payload: self._late_grants(request, payload))

    def put_end(self, tickets: Sequence[Ticket]) -> list[bool]:
        """When it cannot even be sent, the connection is given up: the next hello settles what became of the slots."""
        return self._end(wire.PutEnd(list(tickets)), wire.FLAGS_REPLY)

    def put_revoke(self, tickets: Sequence[Ticket]) -> None:
        """When it cannot even be sent, the connection is given up: the next hello settles what became of the slots."""
        self._end(wire.PutRevoke(list(tickets)), wire.NOTHING_REPLY)

    def demote(self, nbytes: int, avoid: Sequence[int] = ()) -> MovePlan:
        connection = self._live()
        plan = self._ask(wire.Demote(nbytes, list(avoid)), wire.MOVE_PLAN_REPLY, late=self._late_moves, connection=connection)
        return msgspec.structs.replace(plan, lease=_public_lease(plan.lease, connection))

    def spill(self, nbytes: int, avoid: Sequence[int] = ()) -> SpillPlan:
        connection = self._live()
        plan = self._ask(
            wire.PlanSpill(nbytes, list(avoid)), wire.SPILL_PLAN_REPLY, late=self._late_spills, connection=connection
        )
        return msgspec.structs.replace(plan, lease=_public_lease(plan.lease, connection))

    def spilled(self, lease: int, keys: Sequence[bytes]) -> None:
        """Also with a lease of an earlier manager: what is in storage is there."""
        connection = self._live()
        number = _lease_number(lease, connection)
        self._ask(wire.Spilled(number, list(keys)), wire.NOTHING_REPLY, connection=connection)

    def tiers(self, keys: Sequence[bytes]) -> list[int]:
        return self._ask(wire.Tiers(list(keys)), wire.NUMBERS_REPLY)

    def remove(self, keys: Sequence[bytes]) -> int:
        """Its deadline is `wire.WIPE_TIMEOUT` longer than that of other calls: lenders are waited for."""
        return self._ask(wire.Remove(list(keys)), wire.NUMBER_REPLY, timeout=self._config.deadline + wire.WIPE_TIMEOUT)

    def clear(self, namespace: bytes = b"") -> int:
        """Its deadline is a minute where that of other calls is shorter: all chunks are looked at, and lenders are waited for.
        That the manager lives is told by heartbeats meanwhile."""
        timeout = max(self._config.deadline, _CLEAR_TIMEOUT) + wire.WIPE_TIMEOUT
        return self._ask(wire.Clear(namespace), wire.NUMBER_REPLY, timeout=timeout)

    def mount(self, info: SegmentInfo, inventory: Sequence[SlabInventory] = (), gate: GateReport | None = None) -> int:
        """Its deadline grows with the inventory, because the manager reads every header, beside whatever else it does; that
        the manager lives is told by heartbeats meanwhile.

        Raises `ProtocolError` when one slab's headers alone do not fit into a frame.
        """
        connection = self._live()
        headers = sum(len(slab.slot_headers) for slab in inventory) // HEADER_BYTES
        timeout = max(self._config.deadline, self._config.connect_timeout) + headers * _SECONDS_PER_HEADER
        *parts, last = _inventory_parts(inventory, connection.max_frame // 2)
        for part in parts:
            self._ask(wire.InventoryPart(info.uuid, part), wire.NOTHING_REPLY, timeout=timeout, connection=connection)
        report = gate or GateReport()
        return self._ask(wire.Mount(info, last, report), wire.NUMBER_REPLY, timeout=timeout, connection=connection)

    def writers_left(self, uuid: bytes, writers: Sequence[GateWriter]) -> None:
        self._ask(wire.WritersLeft(uuid, list(writers)), wire.NOTHING_REPLY)

    def unmount(self, uuid: bytes) -> None:
        self._ask(wire.Unmount(uuid), wire.NOTHING_REPLY)

    def add_slabs(self, uuid: bytes, slabs: Sequence[SlabInfo]) -> None:
        self._ask(wire.AddSlabs(uuid, list(slabs)), wire.NOTHING_REPLY)

    def drop_slabs(self, uuid: bytes, nbytes: int) -> list[int]:
        return self._ask(wire.DropSlabs(uuid, nbytes), wire.NUMBERS_REPLY)

    def importer_gone(self, uuid: bytes, client: bytes) -> None:
        self._ask(wire.ImporterGone(uuid, client), wire.NOTHING_REPLY)

    def request_resize(self, uuid: bytes, nbytes: int) -> None:
        self._ask(wire.RequestResize(uuid, nbytes), wire.NOTHING_REPLY)

    def wiped(self, token: int) -> None:
        self._ask(wire.Wiped(token), wire.NOTHING_REPLY)

    def segments(self) -> list[SegmentInfo]:
        return self._ask(wire.Segments(), wire.SEGMENTS_REPLY)

    def stats(self) -> StatsReply:
        return self._ask(wire.Stats(), wire.STATS_REPLY)

    # -- calls -----------------------------------------------------------------------------------------------------

    def _ask(
        self,
        request: wire.Request,
        reply: msgspec.msgpack.Decoder[T],
        *,
        timeout: float = 0.0,
        late: Late | None = None,
        connection: Connection | None = None,
    ) -> T:
        payload = self._call(wire.CALL, wire.encode_request(request), timeout=timeout, late=late, connection=connection)
        return wire.decode_value(reply, payload)

    def _end(self, request: wire.Request, reply: msgspec.msgpack.Decoder[T]) -> T:
        """Ask what ends writes. Without hearing of it the manager would keep their slots for as long as the session lasts."""
        connection = self._live()
        try:
            return self._ask(request, reply, connection=connection)
        except NotSentError:
            connection.shut("the end of a write could not be told")
            raise

    def _call(
        self, verb: int, payload: bytes, *, timeout: float = 0.0, late: Late | None = None, connection: Connection | None = None
    ) -> bytes | bytearray:
        connection = connection or self._live()
        try:
            answer = connection.call(verb, payload, timeout or self._config.deadline, late)
        except DeadlineExceededError:
            if self._breaker.failure():
                connection.shut(f"{_MISSES} calls in a row got no answer")
            raise
        if connection.closed:
            raise ManagerUnavailableError(f"manager {self._address}: the session of this answer is over")
        return answer

    def _live(self) -> Connection:
        self._check_process()
        connection = self._connection
        if connection is not None:
            return connection
        if self._closing.is_set():
            raise ManagerUnavailableError(f"manager {self._address}: this client is closed")
        reason = self._failure or f"manager {self._address}: not connected yet"
        raise ManagerUnavailableError(str(reason))

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ManagerUnavailableError(
                f"manager {self._address}: this client belongs to process {self._pid}; a forked child must connect by itself"
            )

    def _late_lease(self, payload: bytes | bytearray) -> None:
        self._release_late(wire.decode_acquired(payload).lease)

    def _late_spills(self, payload: bytes | bytearray) -> None:
        self._release_late(wire.decode_value(wire.SPILL_PLAN_REPLY, payload).lease)

    def _late_moves(self, payload: bytes | bytearray) -> None:
        plan = wire.decode_value(wire.MOVE_PLAN_REPLY, payload)
        tickets = [Ticket(move.key, move.shard, move.grant.location.generation) for move in plan.moves if move.grant.location]
        if tickets:
            self._dispatcher.post(lambda: self._revoke_late(tickets))
        self._release_late(plan.lease)

    def _release_late(self, number: int) -> None:
        connection = self._connection
        if number and connection is not None:
            lease = number + connection.session.epoch
            self._dispatcher.post(lambda: self.release(lease))

    def _late_grants(self, request: PutRequest, payload: bytes | bytearray) -> None:
        grants = wire.decode_value(wire.GRANTS_REPLY, payload)
        tickets = [
            Ticket(key, request.shard, grant.location.generation)
            for key, grant in zip(request.keys, grants, strict=True)
            if grant.status == "granted" and grant.location is not None
        ]
        if tickets:
            self._dispatcher.post(lambda: self._revoke_late(tickets))

    def _revoke_late(self, tickets: list[Ticket]) -> None:
        try:
            self.put_revoke(tickets)
        except VCacheError as error:
            logger.debug("put_revoke of tickets that came too late: %s", error)

    # -- threads ---------------------------------------------------------------------------------------------------

    def _stay_connected(self) -> None:
        while self._wait_for_turn():
            try:
                connection = Connection(
                    self._address, self._hello, max_frame=self._config.max_frame, timeout=self._config.deadline
                )
            except VCacheError as error:
                self._not_connected(error)
                continue
            self._connected(connection)
            reason = connection.read(self._audience.push, self._breaker.success)
            self._lost(connection, reason)

    def _wait_for_turn(self) -> bool:
        """Wait for the breaker's pause and for the write gate. False when the client closes."""
        while not self._closing.wait(self._breaker.retry_in()):
            if self._breaker.allow():
                return self._wait_for_writes()
        return False

    def _wait_for_writes(self) -> bool:
        began, warned = time.monotonic(), False
        while not self._closing.is_set():
            if self._idle_gate(_GATE_TIMEOUT):
                return True
            if not warned and time.monotonic() - began > _GATE_PATIENCE:
                logger.warning("reconnecting to manager %s waits for writes that do not end", self._address)
                warned = True
        return False

    def _idle_gate(self, timeout: float) -> bool:
        """Whether no write of this process is in flight; waits for that at most `timeout` seconds."""
        gate = self._gate
        try:
            return gate is None or gate(timeout)
        except Exception:
            logger.exception("the write gate raised; taken as: writes are in flight")
            self._closing.wait(_GATE_TIMEOUT)
            return False

    def _connected(self, connection: Connection) -> None:
        self._breaker.success()
        with self._changed:
            self._connection, self._failure = connection, None
            self._changed.notify_all()
        self._audience.session_began(connection.session)
        logger.info("connected to manager %s, epoch %d", self._address, connection.session.epoch)
        if self._closing.is_set():
            connection.shut("closed by this client")

    def _not_connected(self, error: VCacheError) -> None:
        self._breaker.trip()
        with self._changed:
            told = str(self._failure) == str(error)
            self._failure = error
            self._changed.notify_all()
        if not told and self._refused():
            logger.error("%s", error)
        elif not told:
            logger.info("%s", error)

    def _lost(self, connection: Connection, reason: str) -> None:
        self._breaker.trip()
        with self._changed:
            self._connection = None
            self._failure = ManagerUnavailableError(f"manager {self._address}: connection lost ({reason})")
            self._changed.notify_all()
        if not self._closing.is_set():
            logger.warning("%s; calls are misses until it is back", self._failure)
            self._audience.session_lost()

    def _beat(self) -> None:
        interval = self._config.heartbeat_interval
        while not self._closing.wait(interval):
            connection = self._connection
            if connection is None:
                continue
            interval = connection.session.heartbeat_interval
            try:
                self._ask(wire.Heartbeat(), wire.NOTHING_REPLY, connection=connection)
            except VCacheError as error:
                logger.debug("heartbeat: %s", error)

    def _refused(self) -> bool:
        return self._failure is not None and not isinstance(self._failure, ManagerUnavailableError)

    def _forget_in_child(self) -> None:
        if self._connection is not None:
            self._connection.forget()


def _close_in_forked_child(client: ManagerClient) -> None:
    """Without this, a child that outlives its parent would hold the session's socket open."""
    reference = weakref.ref(client)

    def forget() -> None:
        alive = reference()
        if alive is not None:
            alive._forget_in_child()

    os.register_at_fork(after_in_child=forget)


def _lease_number(lease: int, connection: Connection) -> int:
    """The manager counts leases from 1 in each epoch; callers get that number plus the epoch. Since epochs are nanoseconds of
    wall-clock time, a lease of an earlier manager falls below 1 here, and can never be mistaken for one of this manager."""
    return max(0, lease - connection.session.epoch)


def _public_lease(number: int, connection: Connection) -> int:
    """What the caller gets for the manager's number (see `_lease_number`); 0 stays 0."""
    return number + connection.session.epoch if number else 0


def _inventory_parts(inventory: Sequence[SlabInventory], limit: int) -> Iterator[list[SlabInventory]]:
    """Split so that each part's headers have at most `limit` bytes. Yields at least one part."""
    part: list[SlabInventory] = []
    size = 0
    for slab in inventory:
        nbytes = len(slab.slab_header) + len(slab.slot_headers)
        if nbytes > limit:
            raise ProtocolError(f"slab {slab.slab}: {nbytes} bytes of headers do not fit a frame; raise manager.max_frame")
        if part and size + nbytes > limit:
            yield part
            part, size = [], 0
        part.append(slab)
        size += nbytes
    yield part
