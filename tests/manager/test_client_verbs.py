"""Every verb over real sockets, unix and TCP, and over the embedded manager: one interface, one behaviour."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from manager_helpers import NAMESPACE, SLOT, Recorder, key, keys, put_request, segment_of, serving, store, wait_until

from vcache.config import ByteSize, ManagerConfig
from vcache.errors import ManagerRefusedError, ProtocolError
from vcache.manager.api import (
    AcquireReply,
    MovePlan,
    ResizeRequested,
    RoomWanted,
    SegmentGone,
    SegmentMounted,
    SpillPlan,
    Ticket,
    WipeSlots,
)
from vcache.manager.client import Manager
from vcache.manager.loopback import Loopback
from vcache.segment.hostinfo import host_id
from vcache.segment.slots import HEADER_BYTES, SlabHeader, SlabInfo, SlabInventory, SlotHeader, slab_geometry


@pytest.fixture(params=["unix", "tcp", "embedded"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    if request.param == "embedded":
        loopback = Loopback(ManagerConfig(), name="writer", host=host_id())
        yield Manager(loopback)
        loopback.check_integrity()
        loopback.close()
        return
    monkeypatch.setenv("VCACHE_TOKEN", "a secret")
    address = f"unix://{tmp_path}/m.sock" if request.param == "unix" else "tcp://127.0.0.1:0"
    with serving(address, max_frame=ByteSize(2**17)) as server:
        client = server.client(name="writer", host=host_id())
        yield client
        client.close()


def test_put_then_read_then_remove(manager: Manager) -> None:
    number = manager.mount(segment_of(manager))
    assert number > 0
    chunk = keys(1, 5)
    grants = manager.put_start(put_request(chunk))
    assert [grant.status for grant in grants] == ["granted"] * 5
    tickets = [Ticket(k, 0, grant.location.generation) for k, grant in zip(chunk, grants, strict=True) if grant.location]
    assert manager.lookup(chunk) == 0, "invisible before put_end (rule I2)"
    assert [grant.status for grant in manager.put_start(put_request(chunk))] == ["busy"] * 5
    manager.put_revoke(tickets[3:])
    assert manager.put_end(tickets) == [True, True, True, False, False]
    assert manager.lookup([*chunk, key(99)]) == 3
    assert manager.tiers([chunk[0], chunk[4]]) == [1, -1]

    reply = manager.acquire([*chunk, key(99)])
    assert reply.lease
    assert 0 < reply.expires_in <= 30
    assert [at.generation for at in reply.locations] == [ticket.generation for ticket in tickets[:3]]
    assert all(at.segment == number and at.slot_bytes == SLOT for at in reply.locations)
    again = manager.acquire(chunk[:2], lease=reply.lease)
    assert again.lease == reply.lease
    assert again.locations == reply.locations[:2]

    assert manager.remove(chunk[:1]) == 0, "leased"
    manager.release(reply.lease)
    wait_until(lambda: manager.stats().gauges["leases"] == 0, what="released")
    assert manager.acquire([key(99)]) == AcquireReply(0, 0.0, [])
    assert manager.lookup(chunk) == 3


def test_chunks_move_down_and_are_spilled(manager: Manager) -> None:
    listener = Recorder()
    manager.subscribe(listener)
    vram = manager.mount(segment_of(manager, 1, slots=10, kind="cuda"))
    dram = manager.mount(segment_of(manager, 2, slots=10))
    assert manager.demote(SLOT) == MovePlan()
    count = slab_geometry(segment_of(manager, 1, slots=10).slabs[0].nbytes, SLOT).slots
    chunk = keys(1, count)
    store(manager, chunk)
    wait_until(lambda: bool(listener.of(RoomWanted)), what="asked for room")
    assert manager.tiers(chunk) == [0] * count

    plan = manager.demote(3 * SLOT)
    assert len(plan.moves) == 3
    assert [manager.acquire([move.key], lease=plan.lease).locations for move in plan.moves] == [
        [move.source] for move in plan.moves
    ]
    tickets = [Ticket(move.key, move.shard, move.grant.location.generation) for move in plan.moves if move.grant.location]
    manager.put_revoke(tickets[2:])
    assert manager.put_end(tickets) == [True, True, False]
    manager.release(plan.lease)
    wait_until(lambda: manager.stats().gauges["leases"] == 0, what="released")
    assert sorted(manager.tiers(chunk)) == [*[0] * (count - 2), 1, 1]
    assert manager.demote(100 * SLOT, [vram]) == MovePlan()

    more = keys(100, count - 2)
    tickets = [
        Ticket(k, 0, grant.location.generation)
        for k, grant in zip(more, manager.put_start(put_request(more, avoid=[vram])), strict=True)
        if grant.location
    ]
    assert all(manager.put_end(tickets))
    spills = manager.spill(2 * SLOT)
    assert len(spills.spills) == 2
    assert manager.acquire([spills.spills[0].key], lease=spills.lease).locations == [spills.spills[0].source]
    assert manager.spill(0, [dram]) == SpillPlan()
    manager.spilled(spills.lease, [spill.key for spill in spills.spills])
    manager.spilled(1, [])  # a lease that is unknown by now
    assert manager.stats().gauges["leases"] == 0
    counters = manager.stats().counters
    assert (counters["demotions"], counters["demotions_refused"], counters["spills"]) == (2, 0, 2)


def test_remove_and_clear_wait_for_the_lender(manager: Manager) -> None:
    def wipe(event: object) -> None:
        if isinstance(event, WipeSlots):
            manager.wiped(event.token)

    manager.mount(segment_of(manager))
    lender = Recorder(wipe)
    manager.subscribe(lender)
    store(manager, keys(1, 6))
    assert manager.remove(keys(1, 2)) == 2
    assert sum(len(each.slots) for each in lender.of(WipeSlots)) == 2, "the answer came after the wipe"
    assert manager.clear(b"x" * 16) == 0
    assert manager.clear(NAMESPACE) == 4
    assert sum(len(each.slots) for each in lender.of(WipeSlots)) == 6
    assert manager.lookup(keys(1, 1)) == 0
    wait_until(lambda: manager.stats().gauges["wipes_outstanding"] == 0)


def test_segments_grow_shrink_and_go(manager: Manager) -> None:
    listener = Recorder()
    manager.subscribe(listener)
    info = segment_of(manager)
    number = manager.mount(info)
    assert [(each.uuid, each.number) for each in manager.segments()] == [(info.uuid, number)]
    manager.add_slabs(info.uuid, [SlabInfo(1, SLOT * 8), SlabInfo(2, SLOT * 8)])
    manager.add_slabs(info.uuid, [SlabInfo(1, SLOT * 8)])
    assert [slab.index for slab in manager.segments()[0].slabs] == [0, 1, 2]
    manager.request_resize(info.uuid, 12345)
    dropped = manager.drop_slabs(info.uuid, SLOT)
    assert len(dropped) == 1
    manager.importer_gone(info.uuid, b"i" * 16)
    manager.unmount(info.uuid)
    manager.unmount(info.uuid)
    assert manager.segments() == []
    wait_until(lambda: bool(listener.of(SegmentGone)))
    assert ResizeRequested(info.uuid, 12345) in listener.events
    assert [len(each.info.slabs) for each in listener.of(SegmentMounted)] == [1, 3, 2]
    assert listener.of(SegmentGone) == [SegmentGone(number, info.uuid)]


def test_late_subscriber_hears_what_is_mounted(manager: Manager) -> None:
    number = manager.mount(segment_of(manager, 1))
    manager.mount(segment_of(manager, 2))
    manager.unmount(segment_of(manager, 2).uuid)
    first = Recorder()
    manager.subscribe(first)
    wait_until(lambda: len(first.events) >= 2)
    assert first.epochs == [manager.epoch]
    assert number in [each.info.number for each in first.of(SegmentMounted)]


def test_inventory_larger_than_a_frame(manager: Manager) -> None:
    info = segment_of(manager, slots=1000)
    size = info.slabs[0].nbytes
    count = slab_geometry(size, SLOT).slots
    generation = manager.epoch - 1000
    header = SlabHeader(generation - 2, SLOT, count).pack()
    slabs = []
    chunks = 0
    for index in range(8):
        headers = [
            SlotHeader(0, 1, generation, key(1 + index * count + slot), NAMESPACE, 256, 256, 0).pack() for slot in range(count)
        ]
        chunks += count
        slabs.append(SlabInventory(index, header, b"".join(headers)))
    whole = msgspec.structs.replace(info, slabs=tuple(SlabInfo(index, size) for index in range(8)))
    assert sum(len(slab.slot_headers) for slab in slabs) == chunks * HEADER_BYTES
    manager.mount(whole, slabs)
    assert manager.stats().gauges["chunks"] == chunks
    assert manager.lookup([key(chunks)]) == 1


def test_stats_and_identity(manager: Manager) -> None:
    manager.mount(segment_of(manager))
    store(manager, keys(1, 3))
    stats = manager.stats()
    assert stats.epoch == manager.epoch > 0
    assert stats.gauges["chunks"] == 3
    assert stats.counters["stored"] == 3
    assert [(each.client, each.name, each.role) for each in stats.sessions] == [(manager.client_id, "writer", "engine")]
    assert stats.segments[0].slots_used == 3


def test_story_of_a_chunk(manager: Manager) -> None:
    assert manager.story(key(1)) == []
    manager.mount(segment_of(manager))
    store(manager, keys(1, 1))
    manager.release(manager.acquire(keys(1, 1)).lease)
    story = manager.story(key(1))
    assert [entry.what for entry in story] == ["granted", "written", "published", "leased", "present"]
    assert [entry.client for entry in story] == ["writer", "writer", "", "writer", ""]
    assert story[0].place == story[-1].place


def test_refusals_are_raised_and_harm_nothing(manager: Manager) -> None:
    with pytest.raises(ProtocolError, match="token counts"):
        manager.put_start(put_request(keys(1, 2), tokens=[1]))
    with pytest.raises(ManagerRefusedError):
        manager.add_slabs(b"?" * 16, [SlabInfo(0, 4096)])
    assert manager.lookup(keys(1, 2)) == 0


def test_eight_threads_at_once(manager: Manager) -> None:
    manager.mount(segment_of(manager, slots=400))
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for turn in range(20):
                mine = keys(1 + 1000 * thread + 2 * turn, 2)
                store(manager, mine)
                assert manager.lookup(mine) == 2
                reply = manager.acquire([*mine, key(999_999)])
                assert len(reply.locations) == 2
                manager.release(reply.lease)
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert manager.stats().gauges["chunks"] == 320
    wait_until(lambda: manager.stats().gauges["leases"] == 0)


def test_closed_manager_says_so(manager: Manager) -> None:
    manager.close()
    manager.close()
    manager.release(1)
    with pytest.raises(ConnectionError, match="closed"):
        manager.lookup([key(1)])
    assert manager.epoch == 0
