"""Writes that outlive what they were granted by: a restarted manager, a closed client, a map of another epoch.

The engines live in this process, so that a writer can be held at a given place; manager and lender are processes.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
import torch
from support.cluster import eventually
from support.paged import Paged, content, spec_for

from vcache import VCacheConfig, VCacheEngine
from vcache.cache import opening
from vcache.paged.cpu_mover import CpuMover

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.processes
LAYOUT = "2BNHD"
SPEC = spec_for(LAYOUT)
CHUNKS = 4


def prompt(seed: int, count: int = 16 * CHUNKS) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(2**31) for i in range(count)]


class HeldMover(CpuMover):
    """Waits at chosen places: before it touches the n-th slot that it is given (`slot`), or amid the n-th payload."""

    def __init__(self, *places: tuple[str, int]) -> None:
        super().__init__()
        self._places = list(places)
        self._counts = {"slot": 0, "payload": 0}
        self._turns = [(threading.Event(), threading.Event()) for _ in places]

    def reached(self, place: int, timeout: float = 30.0) -> bool:
        return self._turns[place][0].wait(timeout)

    def go_on(self, place: int) -> None:
        self._turns[place][1].set()

    def _store_one(self, *arguments: Any) -> bool:
        self._pass("slot")
        return super()._store_one(*arguments)

    def _move(self, *arguments: Any, **options: Any) -> None:
        self._pass("payload")
        super()._move(*arguments, **options)

    def _pass(self, kind: str) -> None:
        place = (kind, self._counts[kind])
        self._counts[kind] += 1
        if place in self._places:
            reached, go_on = self._turns[self._places.index(place)]
            reached.set()
            assert go_on.wait(60)


class Host:
    """An engine of this process and what a test does with it."""

    def __init__(self, cluster: Cluster) -> None:
        manager = {**cluster._manager, "address": cluster.address}
        config = VCacheConfig.from_env(
            {},
            manager=manager,
            segment={"lend": False, "kind": "host", "broker_dir": str(cluster.folder)},
            cache={"chunk_size": 16},
        )
        self.engine = VCacheEngine(config, SPEC, device="cpu")

    def store(self, tokens: list[int], mover: CpuMover | None = None) -> None:
        paged = Paged.zeros(SPEC, LAYOUT, 32, 8)
        paged.write(list(range(len(tokens))), content(SPEC, tokens))
        target = self.engine.bind(paged.tensors)
        if mover is not None:
            self.engine._targets[0] = target = target._replace(mover=mover)
        self.engine.store(tokens, kvcaches=target, slot_mapping=torch.arange(len(tokens)))

    def check(self, tokens: list[int]) -> int:
        """Retrieve; all that is True must be right. The number of True."""
        paged = Paged.zeros(SPEC, LAYOUT, 32, 8)
        slots = list(range(len(tokens)))
        found = int(self.engine.retrieve(tokens, kvcaches=paged.tensors, slot_mapping=torch.tensor(slots)).sum())
        if found:
            rows = paged.read(slots[:found])
            assert np.array_equal(rows, content(SPEC, tokens[:found])), "wrong bytes under a verified True"
        return found

    def slots(self) -> tuple[int, int, int]:
        """Free and used, processing, quarantined, as the manager counts."""
        segments = self.engine.manager.stats().segments
        free = sum(each.slots_free + each.slots_used for each in segments)
        return free, sum(each.slots_processing for each in segments), sum(each.slots_quarantined for each in segments)

    def connected(self) -> bool:
        return bool(self.engine.manager.epoch) and bool(self.engine.manager.segments())


@pytest.fixture
def host(cluster: Cluster) -> Iterator[Callable[[], Host]]:
    hosts: list[Host] = []

    def make() -> Host:
        hosts.append(Host(cluster))
        return hosts[-1]

    yield make
    for each in hosts:
        each.engine.close()


@contextmanager
def held_store(writer: Host, tokens: list[int], *places: tuple[str, int]) -> Iterator[HeldMover]:
    """A store in another thread that waits at these places; all are open when the block ends, and the store has ended."""
    mover = HeldMover(*places)
    with ThreadPoolExecutor(1) as pool:
        storing = pool.submit(writer.store, tokens, mover)
        try:
            yield mover
        finally:
            for place in range(len(places)):
                mover.go_on(place)
        storing.result(60)


@pytest.mark.parametrize("first", [("slot", 0), ("payload", 0)], ids=["before-the-first-header", "amid-a-payload"])
def test_nobody_gets_a_slot_that_a_ticket_of_an_earlier_manager_may_still_write(
    cluster: Cluster, host: Callable[[], Host], first: tuple[str, int]
) -> None:
    """A restarted manager knew of unfinished writes only by their odd headers. Slots whose header was still to come were given
    out anew; the new writer took the old one's odd header over, and the old one then wrote over its published chunk."""
    cluster.lend(size="64KiB", slab="64KiB")
    writer, other = host(), host()
    other.store(prompt(0))
    capacity = other.slots()[0]
    assert CHUNKS < capacity < 3 * CHUNKS
    second = ("payload", first[1] + (first[0] == "payload"))
    with held_store(writer, prompt(1), first, second) as old:
        assert old.reached(0)
        cluster._commands[0].kill()
        cluster.serve()
        eventually(other.connected, what="the lender mounts again")
        # A prompt that takes all that is free: slots of the old writer too, if those are given out.
        with held_store(other, prompt(2, 16 * capacity), ("slot", 0)) as new:
            if new.reached(0, timeout=2):  # it has tickets, and has written nothing
                old.go_on(0)
                assert old.reached(1)  # amid the payload, its header written
        old.go_on(0)
        old.go_on(1)
        eventually(lambda: writer.engine.pool.no_writes(), what="the old writer is done")
        assert other.check(prompt(1)) in (0, 16 * CHUNKS)
        other.check(prompt(2, 16 * capacity))
    eventually(writer.connected, what="the writer says hello again")

    def stored() -> bool:
        other.store(prompt(7))
        return other.check(prompt(7)) == 16 * CHUNKS

    eventually(stored, what="the slab is given out again")
    eventually(lambda: other.slots() == (capacity, 0, 0), what="full capacity back")
    other.check(prompt(1))
    other.check(prompt(2, 16 * capacity))


@pytest.mark.parametrize("first", [("slot", 0), ("payload", 0)], ids=["before-the-first-header", "amid-a-payload"])
def test_what_was_cleared_while_an_old_ticket_was_written_does_not_come_back(
    cluster: Cluster, host: Callable[[], Host], first: tuple[str, int]
) -> None:
    """A write of an earlier manager's ticket ended after the new one had read the headers: a chunk that this one did not know,
    so that `clear` passed it by, and the manager after showed it: KV of old weights under a live key."""
    cluster.lend(size="256KiB", slab="256KiB")
    writer, other = host(), host()
    other.store(prompt(0))
    with held_store(writer, prompt(1), first) as old:
        assert old.reached(0)
        cluster._commands[0].kill()
        cluster.serve()
        eventually(other.connected, what="the lender mounts again")
        other.engine.manager.clear()
        assert other.check(prompt(0)) == 0
    eventually(writer.connected, what="the writer says hello again")

    def stored() -> bool:
        other.store(prompt(7))
        return other.check(prompt(7)) == 16 * CHUNKS

    eventually(stored, what="the slab is given out again")
    assert other.check(prompt(1)) == 0
    cluster._commands[-1].kill()
    cluster.serve()
    eventually(lambda: other.connected() and writer.connected(), what="the lender mounts once more")
    eventually(lambda: other.check(prompt(7)) == 16 * CHUNKS, what="the headers are read")
    assert other.check(prompt(1)) == 0, "cleared before, and back"


def test_closing_beside_a_running_store_frees_no_slot_that_it_writes(
    cluster: Cluster, host: Callable[[], Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`close` said goodbye, which promises that nothing is being written, while another thread's store was."""
    cluster.lend(size="64KiB", slab="64KiB")
    writer, other = host(), host()
    monkeypatch.setattr(opening, "CLOSE_TIMEOUT", 0.1)
    with held_store(writer, prompt(1), ("slot", 1)) as mover:
        assert mover.reached(0)
        writer.engine.close()
        for seed in range(2, 6):
            other.store(prompt(seed))
        assert sum(other.slots()[1:]) >= CHUNKS, "the slots of the write wait for its end"
        mover.go_on(0)
        eventually(lambda: writer.engine.pool.no_writes(), what="the writer is done")
        for seed in range(1, 6):
            other.check(prompt(seed))
    eventually(lambda: other.slots()[1:] == (0, 0), what="the slots come back when the writer is done")


def test_a_ticket_for_one_segment_is_not_used_in_another(cluster: Cluster, host: Callable[[], Host]) -> None:
    """After a manager restart a client could take segment numbers of the new epoch for those of the old one, because it learns
    of the new segments a moment after it is connected: it wrote into memory that its ticket was not for."""
    for _ in range(2):
        cluster.lend(size="64KiB", slab="64KiB")
    writer, other = host(), host()
    eventually(lambda: len(other.engine.manager.segments()) == 2, what="two segments")
    numbers = [info.number for info in writer.engine.manager.segments()]
    for seed in range(2, 4):
        other.store(prompt(seed))

    class Swapped:
        """Answers as they look to one whose map is of another epoch."""

        def __init__(self, manager: Any) -> None:
            self.manager = manager

        def __getattr__(self, name: str) -> Any:
            return getattr(self.manager, name)

        def put_start(self, request: Any) -> Any:
            grants = []
            for grant in self.manager.put_start(request):
                if grant.location is not None:
                    other_number = next(n for n in numbers if n != grant.location.segment)
                    grant = msgspec.structs.replace(grant, location=grant.location._replace(segment=other_number))
                grants.append(grant)
            return grants

    manager = writer.engine.pool.manager
    writer.engine.pool.manager = Swapped(manager)  # type: ignore[assignment]
    writer.store(prompt(1))
    writer.engine.pool.manager = manager
    assert writer.engine.get_stats()["counters"]["put_lapsed"] == CHUNKS
    assert [other.check(prompt(seed)) for seed in range(1, 4)] == [0, 16 * CHUNKS, 16 * CHUNKS]
    writer.store(prompt(1))
    assert other.check(prompt(1)) == 16 * CHUNKS


class PlainError(Exception):
    """As compilers and bindings raise: neither OSError nor RuntimeError."""


@pytest.mark.parametrize("where", ["store", "load"])
def test_any_exception_of_a_mover_is_a_miss_and_nothing_is_leaked(
    cluster: Cluster, host: Callable[[], Host], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exceptions other than OSError and RuntimeError came out of `store` and left the write count, pins and leases behind;
    with the count the client never said hello again."""
    cluster.lend(size="64KiB", slab="64KiB")
    one = host()
    if where == "load":
        one.store(prompt(1))

    def broken(*arguments: Any) -> bool:
        raise PlainError("out of something")

    with monkeypatch.context() as patch:
        patch.setattr(CpuMover, f"_{where}_one", broken)
        if where == "store":
            one.store(prompt(1))
        assert one.check(prompt(1)) == 0
    pool = one.engine.pool
    assert one.engine.get_stats()["counters"]["transfer_errors"] >= 1
    assert pool.no_writes()
    assert all(slab.pins == 0 for link in pool.segments._links.values() for slab in link.mapped.values())
    eventually(lambda: one.slots()[1:] == (0, 0), what="no slot is held")
    assert sum(session.leases for session in one.engine.manager.stats().sessions) == 0
    one.store(prompt(1))
    assert one.check(prompt(1)) == 16 * CHUNKS


def test_a_location_with_another_slot_size_is_a_miss(cluster: Cluster, host: Callable[[], Host]) -> None:
    """The header's place does not depend on the slot size, the payload's does: a wrong size matched the header and read other
    bytes."""
    cluster.lend(size="64KiB", slab="64KiB")
    one = host()
    one.store(prompt(1))
    manager = one.engine.pool.manager

    class Forged:
        def __getattr__(self, name: str) -> Any:
            return getattr(manager, name)

        def acquire(self, *arguments: Any, **options: Any) -> Any:
            reply = manager.acquire(*arguments, **options)
            return reply._replace(locations=[place._replace(slot_bytes=256) for place in reply.locations])

    one.engine.pool.manager = Forged()  # type: ignore[assignment]
    assert one.check(prompt(1)) == 0
    one.engine.pool.manager = manager
    assert one.check(prompt(1)) == 16 * CHUNKS
