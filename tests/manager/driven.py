"""A directory with a method for each verb: what tests call goes through `Directory.handle`, as every client's call does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vcache.manager.api import (
    Acquire,
    AcquireReply,
    AddSlabs,
    Clear,
    Demote,
    DropSlabs,
    GateReport,
    GateWriter,
    ImporterGone,
    Lookup,
    Mount,
    MovePlan,
    PlanSpill,
    Promote,
    PutEnd,
    PutGrant,
    PutRequest,
    PutRevoke,
    PutStart,
    Release,
    Remove,
    RequestResize,
    Spilled,
    SpillPlan,
    Ticket,
    Tiers,
    UndoneSlots,
    Unmount,
    Verb,
    Wiped,
    WritersLeft,
)
from vcache.manager.directory.directory import Directory
from vcache.manager.directory.jobs import Job
from vcache.manager.directory.reading import PackedReply
from vcache.manager.directory.removal import RemovalReply
from vcache.segment.slots import SegmentInfo, SlabInfo, SlabInventory


class Driven(Directory):
    def done(self, client: bytes, verb: Verb[Any], now: float) -> Any:
        """The reply, after all of its work."""
        answer = self.handle(client, verb, now)
        return answer.finish() if isinstance(answer, Job) else answer

    def begun(self, client: bytes, verb: Verb[Any], now: float) -> Job[Any]:
        answer = self.handle(client, verb, now)
        assert isinstance(answer, Job)
        return answer

    def lookup(self, client: bytes, keys: Sequence[bytes], now: float) -> int:
        return self.done(client, Lookup(keys), now)

    def acquire(self, client: bytes, keys: Sequence[bytes], shard: int, lease: int, now: float) -> AcquireReply:
        return self.acquire_packed(client, keys, shard, lease, now).unpack()

    def acquire_packed(self, client: bytes, keys: Sequence[bytes], shard: int, lease: int, now: float) -> PackedReply:
        return self.done(client, Acquire(keys, shard, lease), now)

    def release(self, client: bytes, lease: int, now: float) -> None:
        self.done(client, Release(lease), now)

    def tiers(self, client: bytes, keys: Sequence[bytes], now: float) -> list[int]:
        return self.done(client, Tiers(list(keys)), now)

    def begin_tiers(self, client: bytes, keys: Sequence[bytes], now: float) -> Job[list[int]]:
        return self.begun(client, Tiers(list(keys)), now)

    def put_start(self, client: bytes, request: PutRequest, now: float) -> list[PutGrant]:
        return self.done(client, PutStart(request), now)

    def begin_put_start(self, client: bytes, request: PutRequest, now: float) -> Job[list[PutGrant]]:
        return self.begun(client, PutStart(request), now)

    def put_end(self, client: bytes, tickets: Sequence[Ticket], now: float) -> list[bool]:
        return self.done(client, PutEnd(list(tickets)), now)

    def put_revoke(self, client: bytes, tickets: Sequence[Ticket], now: float) -> None:
        self.done(client, PutRevoke(list(tickets)), now)

    def demote(self, client: bytes, nbytes: int, avoid: Sequence[int], now: float) -> MovePlan:
        return self.done(client, Demote(nbytes, list(avoid)), now)

    def promote(self, client: bytes, nbytes: int, avoid: Sequence[int], now: float) -> MovePlan:
        return self.done(client, Promote(nbytes, list(avoid)), now)

    def spill(self, client: bytes, nbytes: int, avoid: Sequence[int], now: float) -> SpillPlan:
        return self.done(client, PlanSpill(nbytes, list(avoid)), now)

    def spilled(self, client: bytes, lease: int, keys: Sequence[bytes], now: float) -> None:
        self.done(client, Spilled(lease, list(keys)), now)

    def remove(self, client: bytes, keys: Sequence[bytes], now: float) -> RemovalReply:
        return self.done(client, Remove(list(keys)), now)

    def begin_remove(self, client: bytes, keys: Sequence[bytes], now: float) -> Job[RemovalReply]:
        return self.begun(client, Remove(list(keys)), now)

    def clear(self, client: bytes, namespace: bytes, now: float) -> RemovalReply:
        return self.done(client, Clear(namespace), now)

    def begin_clear(self, client: bytes, namespace: bytes, now: float) -> Job[RemovalReply]:
        return self.begun(client, Clear(namespace), now)

    def wiped(self, client: bytes, token: int, now: float) -> None:
        self.done(client, Wiped(token), now)

    def mount(
        self, client: bytes, info: SegmentInfo, inventory: Sequence[SlabInventory], now: float, gate: GateReport | None = None
    ) -> int:
        return self.begin_mount(client, info, inventory, now, gate).finish()

    def begin_mount(
        self, client: bytes, info: SegmentInfo, inventory: Sequence[SlabInventory], now: float, gate: GateReport | None = None
    ) -> Job[int]:
        return self.begun(client, Mount(info, list(inventory), gate or GateReport()), now)

    def writers_left(
        self, client: bytes, uuid: bytes, writers: Sequence[GateWriter], now: float, undone: Sequence[UndoneSlots] = ()
    ) -> None:
        self.done(client, WritersLeft(uuid, list(writers), list(undone)), now)

    def unmount(self, client: bytes, uuid: bytes, now: float) -> None:
        self.done(client, Unmount(uuid), now)

    def add_slabs(self, client: bytes, uuid: bytes, slabs: Sequence[SlabInfo], now: float) -> None:
        self.done(client, AddSlabs(uuid, list(slabs)), now)

    def drop_slabs(self, client: bytes, uuid: bytes, nbytes: int, now: float) -> list[int]:
        return self.done(client, DropSlabs(uuid, nbytes), now)

    def importer_gone(self, client: bytes, uuid: bytes, importer: bytes, now: float) -> None:
        self.done(client, ImporterGone(uuid, importer), now)

    def request_resize(self, client: bytes, uuid: bytes, nbytes: int, now: float) -> None:
        self.done(client, RequestResize(uuid, nbytes), now)
