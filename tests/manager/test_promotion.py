"""Promotion: which chunks move from host memory up to VRAM, who is asked for it, and what becomes of a disturbed move."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from directory_cases import ONE, TWO, gauges, hits, store
from directory_world import SLAB_BYTES, Client, Flight, World

from vcache.errors import ProtocolError
from vcache.manager.directory import heat, promoting
from vcache.manager.directory.slabs import ASK_AGAIN

ALL = 100 * SLAB_BYTES


@pytest.fixture(params=["lru", "sieve"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Engines (0, 1), eight slots of VRAM (2, segment 1) of which promotions fill six, and eight of host memory (3)."""
    world = World(request.param, engines=2, lenders=2, slabs=2, high_watermark=0.9, low_watermark=0.75)
    yield world
    world.directory.check_integrity()
    world.verify_all()


def counters(world: World) -> dict[str, int]:
    return world.directory.stats(world.now).counters


def tiers(world: World, variant=ONE, prompt: int = 0, count: int = 8) -> list[int]:
    return world.directory.tiers(world.clients[1].id, variant.keys(prompt, count), world.now)


def store_below(world: World, prompt: int = 0, count: int = 4, variant=ONE, **options) -> None:
    store(world, variant, prompt, count, avoid=[1], **options)


def read(world: World, prompt: int = 0, count: int = 4, times: int = 1, reader: int = 1, variant=ONE) -> None:
    for _ in range(times):
        lease = world.acquire(world.clients[reader], variant, prompt, 0, count)
        assert lease
        world.release(lease)


def planned(world: World, nbytes: int = ALL, mover: int = 0, **options) -> tuple[int, list[Flight]]:
    client = world.clients[mover]
    before = list(client.flights)
    plan = world.promote(client, nbytes, **options)
    return plan.lease, [flight for flight in client.flights if flight not in before]


def promote(world: World, nbytes: int = ALL, mover: int = 0, **options) -> list[bool]:
    lease, flights = planned(world, nbytes, mover, **options)
    results = world.finish(world.clients[mover], flights)
    if lease:
        world.release(lease)
    return results


def leave(world: World, flights: list[Flight]) -> None:
    """All bytes land, and the mover has not said so yet."""
    for flight in flights:
        while world.write(flight):
            pass


# What is planned


def test_what_is_read_again_moves_up_and_stays_a_hit(world):
    store_below(world)
    assert tiers(world, count=4) == [1] * 4
    read(world)
    assert promote(world) == []  # once is not hot
    read(world, count=3)
    assert promote(world) == [True] * 3
    assert tiers(world, count=4) == [0, 0, 0, 1]
    assert hits(world, ONE, 0, 4) == 4
    read(world)
    assert (counters(world)["promotions"], counters(world)["demotions"], counters(world)["evictions"]) == (3, 0, 0)
    assert (gauges(world)["slots_used"], gauges(world)["slots_processing"]) == (4, 0)
    assert promote(world) == [True]  # the last one, by now
    assert promote(world) == []


def test_look_ups_are_no_leases(world):
    store_below(world)
    for _ in range(5):
        assert hits(world, ONE, 0, 4) == 4
    assert promote(world) == []


def test_vram_is_filled_up_to_the_low_watermark_heads_first(world):
    store_below(world, count=8)
    read(world, count=8, times=2)
    assert promote(world) == [True] * 6
    assert tiers(world) == [0] * 6 + [1] * 2
    assert promote(world) == []
    assert world.demote(world.clients[0], ALL).moves == []  # and nothing goes down again
    assert world.clients[0].room == 0


def test_moves_under_way_count_as_use(world):
    store_below(world, count=8)
    read(world, count=8, times=2)
    _, first = planned(world, 2 * 256)
    lease, second = planned(world, ALL, mover=1)
    assert (len(first), len(second)) == (2, 4)
    assert not {flight.header.key for flight in first} & {flight.header.key for flight in second}
    world.release(lease)
    assert planned(world) == (0, [])
    assert all(world.finish(world.clients[0], first) + world.finish(world.clients[1], second))


def test_moves_up_do_not_count_as_vram_that_will_be_free(world):
    """Demotion leaves out what is on its way down, and only that."""
    store_below(world, count=4)
    read(world, count=4, times=2)
    _, flights = planned(world)
    store(world, ONE, 2, 4, writer=1)
    assert len(flights) == 4
    plan = world.demote(world.clients[1], ALL)
    assert len(plan.moves) == 2  # of eight slots six may be in use


def test_the_latest_read_come_first(world):
    store_below(world, 0)
    store_below(world, 2)
    read(world, 0, times=2)
    read(world, 2, times=2)
    assert promote(world) == [True] * 6
    assert tiers(world, prompt=2, count=4) == [0] * 4
    assert tiers(world, prompt=0, count=4) == [0, 0, 1, 1]


def test_a_plan_holds_at_most_its_bytes_but_at_least_one_chunk(world):
    store_below(world)
    read(world, times=2)
    assert promote(world, 0) == [True]
    assert promote(world, 2 * 256) == [True] * 2
    with pytest.raises(ProtocolError):
        world.directory.promote(world.clients[0].id, -1, [], world.now)


def test_a_full_vram_takes_nothing_notes_nothing_and_evicts_nothing(world):
    store(world, ONE, 2, 6)
    store_below(world)
    read(world, times=3)
    assert not world.directory._state.allocator.hosts["h"].heat.hot
    assert promote(world) == []
    assert counters(world)["evictions"] == 0
    world.remove(world.clients[0], ONE, 2, 0)
    for lender in world.clients[2:]:
        world.wipe(lender)
    assert promote(world) == []  # what was read when there was no room is forgotten
    read(world, times=2)
    assert promote(world) == [True] * 4


def test_who_moved_or_came_anew_is_cold(world):
    store_below(world)
    read(world)
    world.remove(world.clients[0], ONE, 0, 0)
    for lender in world.clients[2:]:
        world.wipe(lender)
    store_below(world)
    read(world)
    assert promote(world) == []
    read(world)
    world.remove(world.clients[0], ONE, 0, 0)
    for lender in world.clients[2:]:
        world.wipe(lender)
    store_below(world)
    assert promote(world) == []  # what was hot is not what is there now
    read(world, times=2)
    assert promote(world) == [True] * 4


def test_leased_chunks_and_segments_to_avoid_are_left_alone(world):
    store_below(world)
    read(world, times=2)
    lease = world.acquire(world.clients[1], ONE, 0, 0, 2)
    assert promote(world) == [True] * 2
    world.release(lease)
    assert promote(world, avoid=[1]) == promote(world, avoid=[2]) == []
    assert promote(world) == [True] * 2


def test_only_memory_of_one_host_counts():
    world = World(engines=1, lenders=1, slabs=2, low_watermark=0.5)
    world.connect(world.new_client("g"))
    world.connect(world.new_lender("host", 2, "g"))
    store(world, ONE, 0, 4, writer=2)
    store(world, ONE, 0, 4, start=4, writer=2, avoid=[1])
    nameless = world.new_client("")
    world.connect(nameless)
    for _ in range(2):
        for reader in (0, 2, 4):
            lease = world.acquire(world.clients[reader], ONE, 0, 0, 8)
            if lease:
                world.release(lease)
    for mover in (0, 2, 4):
        assert world.promote(world.clients[mover], ALL).moves == []
    assert not any(client.promotion for client in world.clients)


def test_every_shard_moves_and_only_the_first_rank_counts(world):
    for shard in range(2):
        store_below(world, count=2, variant=TWO, shard=shard)
    for shard in (1, 1, 0):
        lease = world.acquire(world.clients[1], TWO, 0, 0, 2, shard)
        world.release(lease)
    assert promote(world) == []
    read(world, count=2, variant=TWO)
    assert promote(world) == [True] * 4
    assert tiers(world, TWO, count=2) == [0, 0]


def test_a_shard_goes_to_the_device_that_stored_it():
    world = World(engines=2, lenders=1, slabs=2, low_watermark=0.5)
    for kind in ("cuda", "cuda", "host"):
        world.connect(world.new_lender(kind, 2))
    infos = world.directory.segments()
    devices = [info.device for info in infos if info.kind == "cuda"]
    assert len(devices) == 3
    below = [info.number for info in infos if info.kind == "cuda"]
    for shard in range(2):
        store(world, TWO, 0, 2, shard=shard, avoid=below, device=devices[2 - shard])
    read(world, count=2, times=2, variant=TWO)
    assert promote(world) == [True] * 4
    records = [world.directory._state.chunks.visible[key] for key in TWO.keys(0, 2)]
    at = {info.number: info.device for info in infos}
    for record in records:
        assert [at[place.segment] for place in record.places()] == [devices[2], devices[1]]


def test_what_is_remembered_and_looked_at_is_bounded(world, monkeypatch):
    monkeypatch.setattr(heat, "MAX_CHUNKS", 3)
    store_below(world, count=8)
    read(world, count=8, times=2)
    assert len(world.directory._state.allocator.hosts["h"].heat.hottest(100)) == 3
    monkeypatch.setattr(promoting, "MAX_STEPS", 1)
    assert promote(world) == [True]
    assert promote(world) == [True]


# Who is asked


def asked(world: World) -> list[int]:
    world.settle()
    return [client.promotion for client in world.clients[:2]]


def test_an_engine_is_asked_once_when_the_lease_has_ended(world):
    store_below(world)
    read(world)
    assert asked(world) == [0, 0]
    lease = world.acquire(world.clients[1], ONE, 0, 0, 4)
    assert asked(world) == [0, 0]
    world.release(lease)
    assert asked(world) == [1, 0]  # the one that stores, not the reader
    read(world, times=3)
    assert asked(world) == [1, 0]
    promote(world)
    world.advance(ASK_AGAIN)
    read(world, times=3)
    assert asked(world) == [1, 0]  # nothing is left to move


def test_who_does_nothing_is_not_asked_for_ever(world):
    store_below(world)
    read(world, times=2)
    world.advance(ASK_AGAIN)
    read(world)
    assert asked(world) == [1, 1]
    promote(world, 0, mover=1)
    world.advance(ASK_AGAIN)
    read(world)
    assert asked(world) == [1, 2]
    world.disconnect(world.clients[1])
    world.advance(ASK_AGAIN)
    read(world, reader=0)
    assert asked(world) == [2, 2]


def test_nobody_is_asked_without_room_or_host_memory(world):
    store_below(world)
    read(world, times=1)
    store(world, ONE, 2, 6)
    read(world, times=2)
    assert asked(world) == [0, 0]
    alone = World(engines=2, lenders=1, slabs=2, low_watermark=0.5)
    store(alone, ONE, 0, 4)
    read(alone, times=4)
    assert asked(alone) == [0, 0]


# How a move ends


def test_a_move_under_a_reader_is_refused(world):
    store_below(world)
    read(world, times=2)
    lease, flights = planned(world)
    leave(world, flights)
    reader = world.acquire(world.clients[1], ONE, 0, 0, 1)
    assert sorted(world.finish(world.clients[0], flights)) == [False] + [True] * 3
    assert tiers(world, count=4) == [1, 0, 0, 0]
    refused = counters(world)
    assert (refused["promotions_refused"], refused["demotions_refused"], refused["late_ends"]) == (1, 0, 0)
    world.release(reader)
    world.release(lease)
    assert promote(world) == [True]  # it has been leased once more


def test_a_mover_that_dies_leaves_the_chunks_where_they_were(world):
    store_below(world)
    read(world, times=2)
    mover, vram = world.clients[0], world.clients[2]
    _, flights = planned(world)
    world.write(flights[0])
    world.kill(mover)
    assert gauges(world)["slots_quarantined"] == 4
    assert tiers(world, count=4) == [1] * 4
    world.importer_gone(vram, mover.id)
    world.advance(3.0)
    assert gauges(world)["slots_quarantined"] == 0
    assert hits(world, ONE, 0, 4) == 4


@pytest.mark.parametrize("verb", ["remove", "clear"])
def test_a_removed_chunk_does_not_come_back_with_its_copy(world, verb):
    store_below(world)
    read(world, times=2)
    mover, other = world.clients[0], world.clients[1]
    lease, flights = planned(world)
    leave(world, flights)
    if verb == "remove":
        world.release(lease)
        reply = world.directory.remove(other.id, ONE.keys(0, 4), world.now)
    else:
        world.leases.clear()
        reply = world.directory.clear(other.id, ONE.namespace, world.now)
    world.settle()
    wipe(world, world.clients)
    assert world.directory.outstanding(reply.tokens)
    assert world.finish(mover, flights) == [False] * 4
    wipe(world, world.clients)
    assert not world.directory.outstanding(reply.tokens)
    reconnect(world)
    assert gauges(world)["chunks"] == 0


@pytest.mark.parametrize("when", ["planned", "landed", "published"])
def test_a_restart_amid_a_move_keeps_one_copy(world, when):
    store_below(world)
    read(world, times=2)
    _, flights = planned(world)
    if when != "planned":
        leave(world, flights)
    if when == "published":
        assert world.finish(world.clients[0], flights) == [True] * 4
    reconnect(world)
    assert hits(world, ONE, 0, 4) == gauges(world)["chunks"] == gauges(world)["slots_used"] == 4
    assert gauges(world)["slots_quarantined"] == 0


def test_vram_that_goes_amid_a_move_takes_nothing_with_it(world):
    store_below(world)
    read(world, times=2)
    lease, flights = planned(world)
    leave(world, flights)
    world.disconnect(world.clients[2])
    assert world.finish(world.clients[0], flights) == [False] * 4
    world.release(lease)
    assert tiers(world, count=4) == [1] * 4


def test_the_story_of_a_chunk_tells_of_it(world):
    store_below(world, count=1)
    read(world, count=1, times=2)
    assert promote(world) == [True]
    told = [entry.what for entry in world.directory.story(ONE.keys(0, 1)[0], world.now)]
    assert told[-4:] == ["promotion planned", "written", "promoted", "present"]


def wipe(world: World, clients: list[Client]) -> None:
    for client in clients:
        if client.uuid and client.connected:
            world.wipe(client)


def reconnect(world: World) -> None:
    world.restart_manager()
    for client in world.living:
        world.connect(client)
