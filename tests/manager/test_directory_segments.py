"""Mounting with inventories that nobody vouches for, growing, shrinking."""

from __future__ import annotations

import msgspec
import pytest
from directory_cases import BIG, ME, ONE, TWO, gauges, header, hits, lone, slab_of, store
from directory_world import SLAB_BYTES, World, digest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.config import ManagerConfig
from vcache.errors import ManagerRefusedError, ProtocolError
from vcache.manager.api import PutRequest, ResizeRequested, SegmentMounted, Ticket
from vcache.segment.slots import (
    HEADER_BYTES,
    SlabHeader,
    SlabInfo,
    SlabInventory,
)

# Inventories


@pytest.mark.parametrize(
    "bad",
    [
        header(generation=10),  # not above the format generation
        header(tokens=0),
        header(tokens=2**16),
        header(payload_bytes=0),
        header(payload_bytes=257),
        header(payload_bytes=7),  # not whole tokens
        header(shard=1),
        header(num_shards=0),
        b"\xff" * HEADER_BYTES,
        header().pack()[1:] + b"\0",
    ],
)
def test_strange_headers_are_ignored_one_by_one(bad):
    directory, info = lone()
    directory.mount(ME, info, [slab_of(bad, header(key=b"g" * 16))], 0.0)
    directory.check_integrity()
    assert directory.tiers(ME, [b"k" * 16, b"g" * 16], 0.0) == [-1, 1]
    stats = directory.stats(0.0)
    assert (stats.counters["inventory_ignored"], stats.gauges["slots_free"]) == (1, 3)


def test_an_impossible_generation_is_zeroed_before_the_slot_is_used():
    """It would keep every writer away, who must not overwrite a higher generation."""
    directory, info = lone()
    directory.mount(ME, info, [slab_of(header(generation=2**64 - 2))], 0.0)
    wipes = [push for _, push in directory.take_instructions() if not isinstance(push, SegmentMounted)]
    assert [wipe.slots for wipe in wipes] == [[(0, HEADER_BYTES)]]
    assert directory.stats(0.0).gauges["slots_quarantined"] == 1
    directory.wiped(ME, wipes[0].token, 0.0)
    assert directory.stats(0.0).gauges["slots_quarantined"] == 0
    directory.check_integrity()


@pytest.mark.parametrize(
    "slab_header",
    [
        SlabHeader(10, 256, 5),  # more slots than fit
        SlabHeader(10, 300, 4),
        SlabHeader(2**63, 256, 4),
        SlabHeader(10, 2**40, 4),
    ],
)
def test_a_strange_slab_header_makes_the_slab_unformatted(slab_header):
    directory, info = lone()
    directory.mount(ME, info, [SlabInventory(0, slab_header.pack(), header().pack() * 4)], 0.0)
    stats = directory.stats(0.0)
    assert (stats.gauges["chunks"], stats.segments[0].slabs_unformatted) == (0, 1)


@pytest.mark.parametrize(
    "inventory",
    [
        [slab_of(slab=7)],
        [slab_of(), slab_of()],
        [SlabInventory(0, b"short", b"")],
        [SlabInventory(0, SlabHeader(10, 256, 4).pack(), header().pack())],
        [SlabInventory(0, SlabHeader(10, 256, 4).pack(), header().pack() * 5)],
        [SlabInventory(0, SlabHeader(10, 256, 4).pack(), header().pack() * 4 + b"x")],
    ],
)
def test_an_inventory_that_does_not_fit_is_refused_and_changes_nothing(inventory):
    directory, info = lone()
    with pytest.raises(ProtocolError, match="inventory"):
        directory.mount(ME, info, inventory, 0.0)
    assert directory.segments() == []
    assert directory.take_instructions() == []


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_garbage_never_breaks_anything(data):
    directory, info = lone(slabs=2)
    inventory = []
    for index in range(2):
        slots = data.draw(st.integers(0, 5))
        pieces = []
        for _ in range(slots):
            raw = bytearray(header(key=data.draw(st.sampled_from([b"a" * 16, b"b" * 16])), generation=21).pack())
            for _ in range(data.draw(st.integers(0, 4))):
                raw[data.draw(st.integers(0, 63))] = data.draw(st.integers(0, 255))
            pieces.append(bytes(raw))
        head = bytearray(SlabHeader(10, 256, slots or 1).pack())
        for _ in range(data.draw(st.integers(0, 2))):
            head[data.draw(st.integers(0, 63))] = data.draw(st.integers(0, 255))
        inventory.append(SlabInventory(index, bytes(head), b"".join(pieces)))
    for _ in range(2):
        try:
            directory.mount(ME, info, inventory, 0.0)
        except ProtocolError:
            assert directory.segments() == []
        directory.check_integrity()


def test_of_two_copies_the_higher_generation_wins(world):
    directory, info = lone(slabs=2)
    inventory = [slab_of(header(generation=20), header(generation=24)), slab_of(header(generation=22), slab=1)]
    for order in (inventory, inventory[::-1]):
        directory.mount(ME, info, order, 0.0)
        directory.check_integrity()
        reply = directory.acquire(ME, [b"k" * 16], 0, 0, 0.0)
        assert [(place.slab, place.slot, place.generation) for place in reply.locations] == [(0, 1, 24)]
        assert directory.stats(0.0).gauges["slots_used"] == 1
        directory.release(ME, reply.lease, 0.0)
    # The losers' headers are still there: a removal zeroes them too.
    directory.take_instructions()
    directory.remove(ME, [b"k" * 16], 0.0)
    assert sum(len(push.slots) for _, push in directory.take_instructions()) == 3


def test_a_copy_found_in_an_inventory_does_not_disturb_who_is_writing_the_chunk():
    directory, info = lone()
    other = b"o" * 16
    directory.open_session(other, "o", "lender", 0.0)
    directory.mount(ME, info, [], 0.0)
    request = PutRequest(keys=[b"k" * 16], namespace=b"n" * 16, parent=b"", first_index=0, tokens=[4], slot_bytes=256)
    (grant,) = directory.put_start(ME, request, 0.0)
    _, second = lone(uuid=b"v" * 16, owner=other)
    directory.mount(other, second, [slab_of(header(generation=10**6))], 0.0)
    directory.check_integrity()
    assert directory.put_end(ME, [Ticket(b"k" * 16, 0, grant.location.generation)], 0.0) == [True]
    reply = directory.acquire(ME, [b"k" * 16], 0, 0, 0.0)
    assert reply.locations == [grant.location]
    directory.check_integrity()


def test_shards_meet_whatever_the_order_of_their_lenders():
    directory, info = lone()
    other = b"o" * 16
    directory.open_session(other, "o", "lender", 0.0)
    _, second = lone(uuid=b"v" * 16, owner=other)
    directory.mount(ME, info, [slab_of(header(num_shards=2, shard=1))], 0.0)
    assert directory.lookup(ME, [b"k" * 16], 0.0) == 0
    directory.mount(other, second, [slab_of(header(num_shards=2, shard=0))], 0.0)
    assert directory.lookup(ME, [b"k" * 16], 0.0) == 1
    directory.check_integrity()


def test_a_shard_whose_fellows_never_come_is_given_up():
    directory, info = lone()
    directory.mount(ME, info, [slab_of(header(num_shards=2, shard=1))], 0.0)
    for now in (ManagerConfig().ticket_ttl - 1, ManagerConfig().ticket_ttl):
        assert directory.stats(0.0).gauges["slots_used"] == 1
        directory.heartbeat(ME, now)
        directory.tick(now)
    assert directory.stats(0.0).gauges["slots_used"] == 0
    directory.check_integrity()


def test_a_leased_chunk_does_not_move_to_a_better_copy():
    directory, info = lone()
    other = b"o" * 16
    directory.open_session(other, "o", "lender", 0.0)
    directory.mount(ME, info, [slab_of(header(generation=20))], 0.0)
    lease = directory.acquire(ME, [b"k" * 16], 0, 0, 0.0)
    _, second = lone(uuid=b"v" * 16, owner=other)
    directory.mount(other, second, [slab_of(header(generation=30))], 0.0)
    assert directory.acquire(ME, [b"k" * 16], 0, lease.lease, 0.0).locations == lease.locations
    directory.check_integrity()


def test_mounting_again_changes_nothing(world):
    store(world, ONE, 0, 5)
    lender = world.clients[2]
    number = world.directory.segments()[0].number
    lease = world.acquire(world.clients[1], ONE, 0, 0, 5)
    for _ in range(2):
        world.mount(lender)
    assert [info.number for info in world.directory.segments()] == [number]
    assert hits(world, ONE, 0, 6) == 5
    # The lease goes on.
    assert world.acquire(world.clients[1], ONE, 0, 0, 5, lease=lease) == lease
    assert [grant.status for grant in world.put(world.clients[0], ONE, 2, 0, 8)] == ["granted"] * 3 + ["no_space"] * 5


def test_mount_refusals(world):
    directory, info = lone()
    with pytest.raises(ManagerRefusedError, match="owner"):
        directory.mount(ME, lone(owner=b"x" * 16)[1], [], 0.0)
    with pytest.raises(ProtocolError, match="uuid"):
        directory.mount(ME, lone(uuid=b"x")[1], [], 0.0)
    with pytest.raises(ProtocolError, match="out of range"):
        directory.mount(ME, lone(nbytes=0)[1], [], 0.0)
    twice = msgspec.structs.replace(info, slabs=info.slabs * 2)
    with pytest.raises(ProtocolError, match="twice"):
        directory.mount(ME, twice, [], 0.0)
    directory.mount(ME, info, [], 0.0)
    directory.open_session(b"o" * 16, "o", "lender", 0.0)
    with pytest.raises(ManagerRefusedError, match="another client"):
        directory.mount(b"o" * 16, lone(owner=b"o" * 16)[1], [], 0.0)
    for call in (
        lambda: directory.unmount(b"o" * 16, info.uuid, 0.0),
        lambda: directory.add_slabs(b"o" * 16, info.uuid, [SlabInfo(5, SLAB_BYTES)], 0.0),
        lambda: directory.drop_slabs(b"o" * 16, info.uuid, 1, 0.0),
        lambda: directory.importer_gone(b"o" * 16, info.uuid, ME, 0.0),
    ):
        with pytest.raises(ManagerRefusedError, match="another client"):
            call()
    with pytest.raises(ManagerRefusedError, match="no segment"):
        directory.drop_slabs(ME, b"?" * 16, 1, 0.0)
    directory.importer_gone(ME, b"?" * 16, ME, 0.0)
    directory.check_integrity()


def test_unmount_makes_misses_and_is_idempotent(world):
    store(world, ONE, 0, 5)
    lender = world.clients[2]
    number = world.directory.segments()[0].number
    for _ in range(2):
        world.directory.unmount(lender.id, lender.uuid, world.now)
    assert hits(world, ONE, 0, 5) == 0
    ((target, push),) = world.directory.take_instructions()
    assert (target, push.number, push.uuid) == (None, number, lender.uuid)


def test_a_chunk_in_two_segments_goes_with_either():
    world = World("lru", engines=2, lenders=2, slabs=1)
    store(world, TWO, 0, 1, shard=0, avoid=[1])
    store(world, TWO, 0, 1, shard=1, avoid=[2])
    assert hits(world, TWO, 0, 1) == 1
    world.kill(world.clients[3])
    assert gauges(world)["slots_used"] == gauges(world)["chunks"] == 0
    world.directory.check_integrity()


# Growing and shrinking


def test_added_slabs_are_used_and_announced(world):
    lender = world.clients[2]
    store(world, ONE, 0, 8)
    assert world.put(world.clients[0], BIG, 0, 0, 1)[0].status == "granted"
    world.finish(world.clients[0], list(world.clients[0].flights))
    world.grow(lender)
    assert len(world.directory.segments()[0].slabs) == 3
    store(world, ONE, 2, 4)
    assert hits(world, ONE, 2, 4) == 4


def test_adding_twice_is_idempotent_but_not_with_another_size(world):
    lender = world.clients[2]
    world.grow(lender)
    with pytest.raises(ManagerRefusedError, match="size"):
        world.directory.add_slabs(lender.id, lender.uuid, [SlabInfo(2, 2 * SLAB_BYTES)], world.now)
    with pytest.raises(ManagerRefusedError, match="size"):
        world.directory.add_slabs(lender.id, lender.uuid, [SlabInfo(7, SLAB_BYTES), SlabInfo(7, 2 * SLAB_BYTES)], world.now)
    assert len(world.directory.segments()[0].slabs) == 3


def test_shrinking_takes_empty_slabs_then_cold_ones_whatever_is_in_them(world):
    lender = world.clients[2]
    world.grow(lender)
    store(world, ONE, 0, 4)
    world.advance(1)
    store(world, ONE, 2, 4)
    assert world.directory.drop_slabs(lender.id, lender.uuid, 0, world.now) == []
    assert world.directory.drop_slabs(lender.id, lender.uuid, SLAB_BYTES, world.now) == [2]
    world.acquire(world.clients[1], ONE, 0, 0, 4)
    world.put(world.clients[0], ONE, 0, 4, 1)
    assert (hits(world, ONE, 0, 4), hits(world, ONE, 2, 4)) == (4, 3)
    ticket = world.clients[0].flights[0].ticket
    assert sorted(world.directory.drop_slabs(lender.id, lender.uuid, 10 * SLAB_BYTES, world.now)) == [0, 1]
    assert gauges(world)["chunks"] == gauges(world)["slots_processing"] == 0
    assert world.directory.put_end(world.clients[0].id, [ticket], world.now) == [False]
    with pytest.raises(ManagerRefusedError, match="given back"):
        world.directory.add_slabs(lender.id, lender.uuid, [SlabInfo(0, SLAB_BYTES)], world.now)


def test_the_coldest_slab_is_dropped_first(world):
    lender = world.clients[2]
    store(world, ONE, 0, 4)
    world.advance(1)
    store(world, ONE, 2, 4)
    world.advance(1)
    hits(world, ONE, 0, 4)
    world.shrink(lender, 1)
    assert (hits(world, ONE, 0, 4), hits(world, ONE, 2, 4)) == (4, 0)


def test_resize_requests_reach_the_lender(world):
    lender = world.clients[2]
    world.directory.request_resize(world.clients[0].id, lender.uuid, 12345, world.now)
    assert world.directory.take_instructions() == [(lender.id, ResizeRequested(segment=lender.uuid, nbytes=12345))]
    with pytest.raises(ManagerRefusedError, match="no segment"):
        world.directory.request_resize(world.clients[0].id, b"?" * 16, 1, world.now)


# Placement


def test_local_placement_and_tiers():
    world = World("lru", engines=1, lenders=3, slabs=1)  # cuda, host, cuda
    second = next(info for info in world.directory.segments() if info.number == 3)
    store(world, ONE, 0, 9, device=second.device)
    reply = world.directory.acquire(world.clients[0].id, ONE.keys(0, 9), 0, 0, world.now)
    assert [place.segment for place in reply.locations] == [3] * 4 + [1] * 4 + [2]
    assert world.directory.tiers(world.clients[0].id, ONE.keys(0, 9), world.now) == [0] * 8 + [1]


def test_spread_placement_balances():
    world = World("lru", engines=1, lenders=3, slabs=1)
    store(world, ONE, 0, 9, placement="spread")
    reply = world.directory.acquire(world.clients[0].id, ONE.keys(0, 9), 0, 0, world.now)
    assert [place.segment for place in reply.locations] == [1, 3, 1, 3, 1, 3, 1, 3, 2]


def test_shards_of_different_slot_sizes():
    """Pipeline parallelism: the chunks queue by their first shard's size, yet room is found for the other size too."""
    directory, info = lone(slabs=2, kind="cuda")
    directory.mount(ME, info, [], 0.0)

    def store_shard(name: str, shard: int, slot_bytes: int) -> str:
        request = PutRequest(
            keys=[digest(name)],
            namespace=b"n" * 16,
            parent=b"",
            first_index=0,
            tokens=[1],
            slot_bytes=slot_bytes,
            shard=shard,
            num_shards=2,
        )
        (grant,) = directory.put_start(ME, request, 0.0)
        if grant.location is not None:
            assert directory.put_end(ME, [Ticket(digest(name), shard, grant.location.generation)], 0.0) == [True]
        directory.check_integrity()
        return grant.status

    for name in "ab":
        assert [store_shard(name, 0, 256), store_shard(name, 1, 512)] == ["granted"] * 2
    assert [store_shard("c", 1, 512), store_shard("c", 0, 256)] == ["granted"] * 2
    assert directory.lookup(ME, [digest("c")], 0.0) == 1
