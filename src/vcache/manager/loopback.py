"""`EmbeddedManager`: the directory inside this process, for one engine or for tests."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..config import ManagerConfig
from ..errors import ManagerUnavailableError
from ..segment.slots import SegmentInfo, SlabInfo, SlabInventory
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
from .directory.directory import Directory, RemovalReply, random_first_segment
from .listeners import Audience, Dispatcher
from .wire import WIPE_TIMEOUT


class EmbeddedManager:
    """`Manager` on a `Directory` of its own, with one session: this client's. Thread-safe.

    No thread watches the clock: every call first does what is due (expired leases and tickets, quarantines over). Listeners
    are called from a thread of their own. Two instances share nothing.
    """

    def __init__(
        self,
        config: ManagerConfig,
        *,
        client_id: bytes | None = None,
        name: str = "",
        role: Role = "engine",
        host: str = "",
        remote: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`client_id`: 16 bytes, random by default. `host`, `remote`: as in `protocol.Hello`. `clock`: seconds, never
        backwards."""
        self._client = client_id or secrets.token_bytes(16)
        self._clock = clock
        self._lock = threading.Lock()
        self._wiped = threading.Condition(self._lock)
        self._closed = False
        self._dispatcher = Dispatcher("vcache-manager-events")
        self._audience = Audience(self._dispatcher)
        self._directory = Directory(config, epoch=time.time_ns() & ~1, now=clock(), first_segment=random_first_segment())
        session = self._directory.open_session(self._client, name, role, clock(), host=host, remote=remote)
        self._audience.session_began(session)

    # -- session ---------------------------------------------------------------------------------------------------

    @property
    def client_id(self) -> bytes:
        return self._client

    @property
    def epoch(self) -> int:
        return 0 if self._closed else self._directory.epoch

    def subscribe(self, listener: Listener) -> None:
        self._audience.subscribe(listener)

    def set_write_gate(self, wait_idle: Callable[[float], bool]) -> None:
        """Nothing to do: this session is never lost, so it never says hello again."""

    def close(self) -> None:
        """The chunks are forgotten with the directory. Blocks until listeners have heard what is queued, at most a second."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wiped.notify_all()
        self._dispatcher.close(timeout=1.0)

    # -- verbs -----------------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> int:
        with self._turn() as now:
            return self._directory.lookup(self._client, keys, now)

    def acquire(self, keys: Sequence[bytes], shard: int = 0, *, lease: int = 0) -> AcquireReply:
        with self._turn() as now:
            return self._directory.acquire(self._client, keys, shard, lease, now)

    def release(self, lease: int) -> None:
        """Also returns quietly after `close`."""
        if lease and not self._closed:
            with self._turn() as now:
                self._directory.release(self._client, lease, now)

    def put_start(self, request: PutRequest) -> list[PutGrant]:
        with self._turn() as now:
            return self._directory.put_start(self._client, request, now)

    def put_end(self, tickets: Sequence[Ticket]) -> list[bool]:
        with self._turn() as now:
            return self._directory.put_end(self._client, tickets, now)

    def put_revoke(self, tickets: Sequence[Ticket]) -> None:
        with self._turn() as now:
            self._directory.put_revoke(self._client, tickets, now)

    def demote(self, nbytes: int, avoid: Sequence[int] = ()) -> MovePlan:
        with self._turn() as now:
            return self._directory.demote(self._client, nbytes, avoid, now)

    def spill(self, nbytes: int, avoid: Sequence[int] = ()) -> SpillPlan:
        with self._turn() as now:
            return self._directory.spill(self._client, nbytes, avoid, now)

    def spilled(self, lease: int, keys: Sequence[bytes]) -> None:
        with self._turn() as now:
            self._directory.spilled(self._client, lease, keys, now)

    def tiers(self, keys: Sequence[bytes]) -> list[int]:
        with self._turn() as now:
            return self._directory.tiers(self._client, keys, now)

    def remove(self, keys: Sequence[bytes]) -> int:
        """Blocks at most `WIPE_TIMEOUT` for the lender in this process, but not inside a listener: it would wait for itself."""
        with self._turn() as now:
            reply = self._directory.remove(self._client, keys, now)
        return self._await_wipes(reply)

    def clear(self, namespace: bytes = b"") -> int:
        """Blocks as `remove` does."""
        with self._turn() as now:
            reply = self._directory.clear(self._client, namespace, now)
        return self._await_wipes(reply)

    def mount(self, info: SegmentInfo, inventory: Sequence[SlabInventory] = (), gate: GateReport | None = None) -> int:
        with self._turn() as now:
            return self._directory.mount(self._client, info, inventory, now, gate)

    def writers_left(self, uuid: bytes, writers: Sequence[GateWriter]) -> None:
        with self._turn() as now:
            self._directory.writers_left(self._client, uuid, writers, now)

    def unmount(self, uuid: bytes) -> None:
        with self._turn() as now:
            self._directory.unmount(self._client, uuid, now)

    def add_slabs(self, uuid: bytes, slabs: Sequence[SlabInfo]) -> None:
        with self._turn() as now:
            self._directory.add_slabs(self._client, uuid, slabs, now)

    def drop_slabs(self, uuid: bytes, nbytes: int) -> list[int]:
        with self._turn() as now:
            return self._directory.drop_slabs(self._client, uuid, nbytes, now)

    def importer_gone(self, uuid: bytes, client: bytes) -> None:
        with self._turn() as now:
            self._directory.importer_gone(self._client, uuid, client, now)

    def request_resize(self, uuid: bytes, nbytes: int) -> None:
        with self._turn() as now:
            self._directory.request_resize(self._client, uuid, nbytes, now)

    def wiped(self, token: int) -> None:
        with self._turn() as now:
            self._directory.wiped(self._client, token, now)
            self._wiped.notify_all()

    def segments(self) -> list[SegmentInfo]:
        with self._turn():
            return self._directory.segments()

    def stats(self) -> StatsReply:
        with self._turn() as now:
            return self._directory.stats(now)

    def check_integrity(self) -> None:
        """For tests. Raises `IntegrityError` naming the rule that does not hold."""
        with self._lock:
            self._directory.check_integrity()

    # -- helpers ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self) -> Iterator[float]:
        """One step of the directory: what is due first, then the caller's verb, then the pushes that came of both."""
        with self._lock:
            if self._closed:
                raise ManagerUnavailableError("manager embedded: this client is closed")
            now = self._clock()
            self._directory.heartbeat(self._client, now)  # First: while this process lives, its session does.
            self._directory.tick(now)
            try:
                yield now
            finally:
                for target, push in self._directory.take_instructions():
                    if push is not None and target in (None, self._client):
                        self._audience.push(push)

    def _await_wipes(self, reply: RemovalReply) -> int:
        if reply.tokens and self._audience.listens() and not self._dispatcher.is_current():
            with self._lock:
                self._wiped.wait_for(lambda: self._closed or not self._directory.outstanding(reply.tokens), WIPE_TIMEOUT)
        return reply.removed
