"""The log of the directory: what it tells of a chunk, and how little it holds."""

from __future__ import annotations

import tracemalloc

from directory_cases import ME, ONE, TWO, header, lone, slab_of, store
from directory_world import CONFIG, World
from driven import Driven

from vcache.config import ManagerConfig
from vcache.manager import wire
from vcache.manager.api import Place, StoryEntry
from vcache.manager.directory import log
from vcache.manager.directory.log import Log
from vcache.segment.slots import SlotLocation


def told(world: World, key: bytes) -> list[str]:
    return [entry.what for entry in world.directory.story(key, world.now)]


def test_the_life_of_a_chunk_is_told_in_order() -> None:
    world = World(engines=2, lenders=2, slabs=2)
    writer, reader = world.clients[:2]
    key = ONE.keys(0, 1)[0]
    assert told(world, key) == []
    world.acquire(reader, ONE, 0, 0, 1)
    world.advance(1.0)
    world.put(writer, ONE, 0, 0, 1)
    assert told(world, key)[-1] == "being written"
    world.finish(writer, list(writer.flights))
    world.advance(2.0)
    lease = world.acquire(reader, ONE, 0, 0, 1)
    story = world.directory.story(key, world.now)
    assert [entry.what for entry in story] == ["looked up", "granted", "written", "published", "leased", "present"]
    missed, granted, written, published, leased, present = story
    assert (missed.detail, missed.ago, missed.client) == ("not found", 3.0, "c")
    assert granted.place is not None
    assert granted.place == present.place
    (location,) = world.directory._state.chunks.visible[key].places()
    assert granted.place == Place("vram", location.segment, location.slab, location.slot, location.generation)
    assert f"generation {location.generation}" in written.detail
    assert (published.client, leased.client, present.detail) == ("", "c", "leased 1 time(s)")
    world.release(lease)
    world.remove(writer, ONE, 0, 0)
    assert told(world, key)[-3:] == ["remove asked", "removed", "absent"]


def test_where_a_chunk_went_is_told() -> None:
    world = World(engines=2, lenders=2, slabs=2)
    writer = world.clients[0]
    store(world, ONE, 0, 8)
    plan = world.demote(writer, 2 * 256)
    moved = plan.moves[0].key
    world.finish(writer, list(writer.flights))
    world.release(plan.lease)
    assert told(world, moved)[-4:] == ["demotion planned", "written", "demoted", "present"]
    (demoted,) = [entry for entry in world.directory.story(moved, world.now) if entry.what == "demoted"]
    assert demoted.place is not None
    assert demoted.place.tier == "dram"
    world.clear(writer, ONE)
    assert told(world, moved)[-2:] == ["cleared", "absent"]


def test_evictions_and_lost_lenders_are_told_with_their_reason() -> None:
    world = World(engines=2, lenders=1, slabs=1)
    store(world, ONE, 0, 4)
    store(world, ONE, 2, 4)
    gone = next(key for key in ONE.keys(0, 4) if key not in world.directory._state.chunks.visible)
    (evicted,) = [entry for entry in world.directory.story(gone, world.now) if entry.what == "evicted"]
    assert evicted.detail == "room for a store"
    left = next(iter(world.directory._state.chunks.visible))
    world.disconnect(world.clients[2])
    assert [entry.detail for entry in world.directory.story(left, world.now) if entry.what == "evicted"] == [
        "its segment went, or was mounted again"
    ]
    assert {entry.place.tier for entry in world.directory.story(left, world.now) if entry.place is not None} == {None}


def test_writes_that_do_not_end_well_are_told() -> None:
    world = World(engines=2, lenders=1, slabs=2)
    first, second = world.clients[:2]
    world.put(first, ONE, 0, 0, 2)
    world.revoke(first, first.flights[0])
    assert told(world, ONE.keys(0, 1)[0])[-2:] == ["given up", "absent"]
    world.put(second, ONE, 0, 0, 2)
    refused = [entry for entry in world.directory.story(ONE.keys(0, 2)[1], world.now) if entry.what == "not granted"]
    assert [entry.detail for entry in refused] == ["busy"]
    world.advance(CONFIG["ticket_ttl"])
    assert told(world, ONE.keys(0, 2)[1])[-2:] == ["quarantined", "absent"]
    world.finish(first, list(first.flights))
    assert told(world, ONE.keys(0, 2)[1])[-2:] == ["not taken", "absent"]
    store(world, TWO, 0, 1, shard=1)
    world.advance(CONFIG["ticket_ttl"])
    (dropped,) = [entry for entry in world.directory.story(TWO.keys(0, 1)[0], world.now) if entry.what == "dropped"]
    assert dropped.place is not None


def test_what_was_found_in_memory_is_told() -> None:
    directory, info = lone(slabs=1)
    directory.mount(ME, info, [slab_of(header(b"k" * 16))], 0.0)
    entries = directory.story(b"k" * 16, 1.5)
    assert [(entry.what, entry.ago) for entry in entries] == [("recovered", 1.5), ("present", 0.0)]


def test_spills_are_told() -> None:
    world = World(engines=2, lenders=2, slabs=1)
    writer = world.clients[0]
    store(world, ONE, 0, 8, avoid=[info.number for info in world.directory.segments() if info.kind == "cuda"])
    plan = world.spill(writer, 10 * 256)
    world.spilled(writer, plan.lease, [plan.spills[0].key])
    assert told(world, plan.spills[0].key)[-3:-1] == ["spill planned", "spilled"]
    world.directory.spilled(writer.id, 0, [b"s" * 16], world.now)
    assert told(world, b"s" * 16) == ["spilled", "absent"]


def test_a_look_up_of_many_keys_is_one_entry_that_keeps_them_as_they_came() -> None:
    directory = Driven(ManagerConfig(), epoch=2)
    directory.open_session(ME, "tool", "tool", 0.0)
    keys = [number.to_bytes(16, "little") for number in range(20_000)]
    directory.lookup(ME, keys, 1.0)
    assert [entry[4] for entry in directory._state.log.reads.entries] == [keys]
    assert directory._state.log.reads.entries[0][4] is keys
    assert directory.story(keys[7], 3.0) == [
        StoryEntry(ago=2.0, client="tool", what="looked up", detail="not found"),
        StoryEntry(what="absent"),
    ]


def test_the_log_is_bounded_in_entries_and_in_what_they_hold() -> None:
    directory = Driven(ManagerConfig(), epoch=2)
    directory.open_session(ME, "tool", "tool", 0.0)
    most = log.MAX_READ_BYTES // log.ENTRY_BYTES
    for _ in range(most + 100):
        directory.lookup(ME, [b"k" * 16], 1.0)
    assert len(directory._state.log.reads.entries) <= most
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for turn in range(20):
        directory.lookup(ME, [(turn * 20_000 + number).to_bytes(16, "little") for number in range(20_000)], 1.0)
        payload = b"".join((turn * 20_000 + number).to_bytes(16, "big") for number in range(20_000))
        directory.handle(ME, wire.CODECS[wire.LOOKUP].decode(payload), 1.0)
        directory.lookup(ME, [b"k" * 16] * (log.MAX_READ_BYTES // 16), 1.0)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 5 * log.MAX_READ_BYTES, "a caller's own keys are objects: four times as large as in frames"
    directory.check_integrity()
    assert directory.story(b"k" * 16, 1.0) == [], "what is too old is forgotten"
    assert directory.story((20 * 20_000 - 1).to_bytes(16, "big"), 1.0)[0].what == "looked up"


def test_seldom_things_outlive_many_look_ups() -> None:
    kept = Log()
    kept.happened(1.0, "evicted", (b"e" * 16,), "room for a store")
    for number in range(3 * log.MAX_READ_BYTES // log.ENTRY_BYTES):
        kept.reads.add((number, 2.0, "", "lookup", (b"k" * 16,), 0, 0, 320))
    assert [line.what for line in kept.story(b"e" * 16)] == ["evicted"]


def test_the_places_of_all_shards_count_and_are_told() -> None:
    """Where many shards of evicted chunks had been was kept beside the bound, and not told."""
    kept = Log()
    places = b"".join(SlotLocation(1, 2, 4, shard, 256, 20).pack() for shard in range(64))
    for number in range(30_000):
        kept.happened(0.0, "evicted", (number.to_bytes(16, "little"),), "room", places)
    kept.check_integrity()
    assert sum(len(entry[5][1]) for entry in kept.lives.entries) <= log.MAX_LIFE_BYTES
    lines = kept.story((29_999).to_bytes(16, "little"))
    assert [(line.shard, line.place.slot) for line in lines] == [(shard, shard) for shard in range(64)]


def test_what_a_hello_ends_is_told_at_its_time() -> None:
    """It had the time of the last call before, by whomever."""
    world = World(engines=2, lenders=1, slabs=2)
    client = world.clients[0]
    world.put(client, ONE, 0, 0, 1)
    directory = world.directory
    directory.close_session(client.id, world.now)
    directory.open_session(client.id, "c", "engine", world.now + 5.0)
    (given_up,) = [entry for entry in directory.story(ONE.keys(0, 1)[0], world.now + 6.0) if entry.what == "given up"]
    assert given_up.ago == 1.0
