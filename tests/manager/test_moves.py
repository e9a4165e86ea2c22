"""Demotion: which chunks move from VRAM to host memory, and what becomes of a move that is disturbed."""

from __future__ import annotations

import pytest
from directory_cases import ONE, TWO, gauges, hits, store
from directory_world import SLAB_BYTES, Client, Flight, World

from vcache.errors import IntegrityError, ProtocolError
from vcache.manager.directory import demoting
from vcache.manager.directory.records import Record

ALL = 100 * SLAB_BYTES


@pytest.fixture
def world(tiered_world: World) -> World:
    return tiered_world


def counters(world: World) -> dict[str, int]:
    return world.directory.stats(world.now).counters


def tiers(world: World, variant=ONE, prompt: int = 0, count: int = 8) -> list[int]:
    return world.directory.tiers(world.clients[1].id, variant.keys(prompt, count), world.now)


def planned(world: World, nbytes: int = ALL, mover: int = 0, **options) -> tuple[int, list[Flight]]:
    """A plan's lease, and its moves for the mover to carry out."""
    client = world.clients[mover]
    before = list(client.flights)
    plan = world.demote(client, nbytes, **options)
    return plan.lease, [flight for flight in client.flights if flight not in before]


def demote(world: World, nbytes: int = ALL, mover: int = 0) -> list[bool]:
    lease, flights = planned(world, nbytes, mover)
    results = world.finish(world.clients[mover], flights)
    if lease:
        world.release(lease)
    return results


def demote_all(world: World) -> int:
    """Until a plan is empty, as an engine does it; shards moved."""
    moved = 0
    while results := demote(world):
        assert all(results)
        moved += len(results)
    return moved


def visible(world: World, variant=ONE, index: int = 0) -> Record:
    return world.directory._state.chunks.visible[variant.keys(0, index + 1)[index]]


def leave(world: World, client: Client, flights: list[Flight]) -> None:
    """All bytes land, and the mover has not said so yet."""
    for flight in flights:
        while world.write(flight):
            pass
    assert all(flight.phase == 4 for flight in flights)


# What is planned


def test_cold_chunks_move_down_to_the_low_watermark_and_stay_hits(world):
    store(world, ONE, 0, 8)
    assert tiers(world) == [0] * 8
    # Of eight slots a low watermark of 0.2 leaves one; the tails are the coldest, since they were published first.
    assert demote(world) == [True] * 7
    assert tiers(world) == [0, *[1] * 7]
    assert hits(world, ONE, 0, 8) == 8
    world.acquire(world.clients[1], ONE, 0, 0, 8)
    assert counters(world)["demotions"] == 7
    assert (gauges(world)["slots_used"], gauges(world)["slots_processing"]) == (8, 0)
    assert demote(world) == []


def test_a_plan_holds_at_most_its_bytes_but_at_least_one_chunk(world):
    store(world, ONE, 0, 8)
    assert demote(world, nbytes=0) == [True]
    assert demote(world, nbytes=3 * 256) == [True] * 3
    assert demote(world, nbytes=3 * 256 - 1) == [True] * 2
    with pytest.raises(ProtocolError):
        world.directory.demote(world.clients[0].id, -1, [], world.now)


def test_what_moves_already_counts_as_gone_and_is_not_planned_twice(world):
    store(world, ONE, 0, 8)
    _, first = planned(world, 4 * 256)
    lease, second = planned(world, ALL, mover=1)
    assert (len(first), len(second)) == (4, 3)
    world.release(lease)
    assert planned(world, mover=1) == (0, [])
    assert all(world.finish(world.clients[0], first) + world.finish(world.clients[1], second))


def test_the_coldest_go_first_and_used_ones_are_spared(world):
    store(world, ONE, 0, 4)
    world.advance(1)
    store(world, ONE, 2, 4)
    world.advance(1)
    assert hits(world, ONE, 0, 4) == 4
    assert demote(world, 4 * 256) == [True] * 4
    assert (tiers(world, ONE, 0, 4), tiers(world, ONE, 2, 4)) == ([0] * 4, [1] * 4)
    demote(world)
    assert tiers(world, ONE, 0, 4).count(1) == 3


def test_chunks_that_somebody_leases_are_not_planned(world):
    store(world, ONE, 0, 8)
    lease = world.acquire(world.clients[1], ONE, 0, 0, 6)
    assert demote(world) == [True] * 2
    world.release(lease)
    world.advance(1)
    assert demote(world) == [True] * 5


def test_segments_to_avoid_are_neither_source_nor_target(world):
    store(world, ONE, 0, 8)
    for number in (1, 2):
        assert world.directory.demote(world.clients[0].id, ALL, [number], world.now).moves == []
    assert demote(world) == [True] * 7


def test_only_memory_of_the_callers_host_counts():
    world = World(engines=1, lenders=1, slabs=2)
    world.connect(world.new_client("g"))
    world.connect(world.new_lender("host", 2, "g"))
    store(world, ONE, 0, 8)
    assert demote(world) == []  # VRAM here, host memory there
    assert demote(world, mover=2) == []
    nameless = world.new_client("")
    world.connect(nameless)
    assert world.directory.demote(nameless.id, ALL, [], world.now).moves == []
    world.connect(world.new_lender("host", 1, "h"))
    assert demote(world) == [True] * 4


def test_every_shard_moves_on_its_own(world):
    for shard in range(2):
        store(world, TWO, 0, 4, shard=shard)
    assert demote(world, nbytes=2 * 256) == [True] * 2
    lease, flights = planned(world)
    first, *rest = flights
    assert world.finish(world.clients[0], [first]) == [True]
    assert tiers(world, TWO, 0, 4).count(1) == 2  # not all of it is in VRAM
    for flight in rest:
        world.revoke(world.clients[0], flight)
    world.release(lease)
    assert hits(world, TWO, 0, 4) == 4
    for shard in range(2):
        world.acquire(world.clients[1], TWO, 0, 0, 4, shard)


# Where they go


def test_host_memory_is_emptied_only_of_what_is_not_hotter(world):
    store(world, ONE, 0, 8)
    assert demote(world) == [True] * 7
    world.advance(1)
    store(world, ONE, 2, 8)  # fills VRAM and the last host slot, and evicts one
    world.advance(1)
    assert demote(world, 4 * 256) == [True] * 4
    assert counters(world)["evictions"] >= 3
    assert tiers(world, ONE, 2, 8).count(1) >= 4


def test_hot_chunks_in_host_memory_stay(world):
    store(world, ONE, 0, 8)
    assert demote(world) == [True] * 7
    store(world, ONE, 2, 1, avoid=[1])
    store(world, ONE, 3, 7)
    world.advance(1)
    assert hits(world, ONE, 0, 8) + hits(world, ONE, 2, 1) == 9
    assert demote(world) == []
    world.advance(1)
    assert hits(world, ONE, 3, 7) == 7  # now what lies below is colder
    assert demote_all(world) == 7
    assert counters(world)["evictions"] == 7


def test_without_room_the_same_chunk_is_first_again(world):
    store(world, ONE, 0, 8)
    lender = world.clients[3]
    world.directory.drop_slabs(lender.id, lender.uuid, ALL, world.now)
    lender.slabs.clear()
    assert demote(world) == []
    world.grow(lender)
    assert demote(world, 0) == [True]
    assert tiers(world) == [*[0] * 7, 1]


# How a move ends


def test_a_second_end_changes_nothing(world):
    store(world, ONE, 0, 8)
    lease, flights = planned(world)
    tickets = [flight.ticket for flight in flights]
    assert world.finish(world.clients[0], flights) == [True] * 7
    assert world.directory.put_end(world.clients[0].id, tickets, world.now) == [True] * 7
    world.release(lease)
    assert counters(world)["demotions"] == 7
    assert counters(world)["demotions_refused"] == counters(world)["late_ends"] == 0


def test_a_move_under_a_reader_is_refused(world):
    store(world, ONE, 0, 8)
    _, flights = planned(world)
    leave(world, world.clients[0], flights)
    reader = world.acquire(world.clients[1], ONE, 0, 7, 1)
    before = visible(world, ONE, 7).packed
    results = world.finish(world.clients[0], flights)
    assert sorted(results) == [False] + [True] * 6
    assert visible(world, ONE, 7).packed == before
    assert (counters(world)["demotions_refused"], counters(world)["late_ends"]) == (1, 0)
    assert gauges(world)["slots_processing"] == 0
    world.release(reader)


def test_the_movers_own_lease_is_no_reader_but_its_others_are(world):
    store(world, ONE, 0, 8)
    lease, flights = planned(world, 2 * 256)
    world.acquire(world.clients[0], ONE, 0, 7, 1)
    assert sorted(world.finish(world.clients[0], flights)) == [False, True]
    world.release(lease)


def test_a_move_whose_lease_has_ended_is_still_taken(world):
    store(world, ONE, 0, 8)
    lease, flights = planned(world, 2 * 256)
    world.release(lease)
    assert world.finish(world.clients[0], flights) == [True] * 2
    lease, flights = planned(world, 2 * 256)
    leave(world, world.clients[0], flights)
    world.acquire(world.clients[1], ONE, 0, 0, 8)
    world.release(lease)  # the one lease that is left is the reader's
    assert world.finish(world.clients[0], flights) == [False] * 2


@pytest.mark.parametrize("order", ["first", "second"])
def test_of_two_moves_of_one_shard_only_one_is_taken(world, order):
    store(world, ONE, 0, 8)
    lease, first = planned(world, 0)
    world.release(lease)
    world.directory._state.chunks.policy.forget_scans("h")
    lease, second = planned(world, 0, mover=1)
    assert first[0].header.key == second[0].header.key
    world.release(lease)
    ends = [lambda: world.finish(world.clients[0], first), lambda: world.finish(world.clients[1], second)]
    if order == "second":
        ends.reverse()
    leave(world, world.clients[0], first)
    leave(world, world.clients[1], second)
    assert [end() for end in ends] == [[True], [False]]
    assert gauges(world)["slots_used"] == 8


def test_a_chunk_that_is_evicted_or_stored_anew_meanwhile_does_not_move(world):
    store(world, ONE, 0, 8)
    lease, flights = planned(world, 2 * 256)
    world.release(lease)
    lender = world.clients[2]
    leave(world, world.clients[0], flights)
    world.mount(lender)  # The same chunks come back in a segment with another generation of places.
    assert hits(world, ONE, 0, 8) == 8
    world.shrink(lender, ALL)
    assert hits(world, ONE, 0, 8) == 0
    assert world.finish(world.clients[0], flights) == [False] * 2
    assert gauges(world)["slots_used"] == gauges(world)["slots_processing"] == 0


def test_a_move_that_lapses_waits_in_quarantine_for_its_mover(world):
    store(world, ONE, 0, 8)
    _, flights = planned(world, 2 * 256)
    world.advance(9.0)
    assert gauges(world)["slots_quarantined"] == 2
    assert hits(world, ONE, 0, 8) == 8
    assert demote(world, 0, mover=1) == [True]  # nobody waits for the chunk
    assert world.finish(world.clients[0], flights) == [False] * 2
    assert gauges(world)["slots_quarantined"] == 0


def test_a_mover_that_dies_is_waited_for_as_any_writer(world):
    store(world, ONE, 0, 8)
    mover = world.clients[0]
    _, flights = planned(world, 2 * 256)
    world.write(flights[0])
    world.kill(mover)
    assert gauges(world)["slots_quarantined"] == 2
    host = world.clients[2]
    assert host.kind == "host"
    assert list(host.lost) == [mover.id]
    world.importer_gone(host, mover.id)
    world.advance(3.0)
    assert gauges(world)["slots_quarantined"] == 0
    assert world.directory.lookup(world.clients[0].id, ONE.keys(0, 8), world.now) == 8


def test_a_hello_ends_the_moves_of_the_session_before(world):
    store(world, ONE, 0, 8)
    planned(world, 2 * 256)
    world.connect(world.clients[0])
    assert gauges(world)["slots_processing"] == gauges(world)["slots_quarantined"] == 0
    assert demote_all(world) == 7


# Removal and restart


@pytest.mark.parametrize("landed", [False, True])
@pytest.mark.parametrize("verb", ["remove", "clear"])
def test_a_removed_chunk_does_not_come_back_with_its_copy(world, verb, landed):
    store(world, ONE, 0, 8)
    mover, other = world.clients[0], world.clients[1]
    lease, flights = planned(world)
    if landed:
        leave(world, mover, flights)
    if verb == "remove":
        world.release(lease)
        reply = world.directory.remove(other.id, ONE.keys(0, 8), world.now)
    else:
        world.leases.clear()
        reply = world.directory.clear(other.id, ONE.namespace, world.now)
    world.settle()
    for lender in world.clients[2:]:
        world.wipe(lender)
    assert world.directory.outstanding(reply.tokens)  # the copies may be complete
    if landed:
        assert world.finish(mover, flights) == [False] * 7
    else:
        for flight in flights:
            world.revoke(mover, flight)
    for lender in world.clients[2:]:
        world.wipe(lender)
    assert not world.directory.outstanding(reply.tokens)
    world.restart_manager()
    for client in world.living:
        world.connect(client)
    assert hits(world, ONE, 0, 1) == gauges(world)["chunks"] == 0


def test_a_chunk_removed_while_the_lender_of_its_copy_is_away_does_not_come_back(world):
    store(world, ONE, 0, 8)
    mover, host = world.clients[0], world.clients[3]
    lease, flights = planned(world, 2 * 256)
    world.release(lease)
    world.remove(world.clients[1], ONE, 0, 0)
    leave(world, mover, flights)
    world.disconnect(host)
    assert world.finish(mover, flights) == [False] * 2
    world.connect(host)
    for lender in world.clients[2:]:
        world.wipe(lender)
    assert gauges(world)["chunks"] == 0


def test_after_a_restart_one_of_two_copies_is_kept(world):
    store(world, ONE, 0, 8)
    demote(world)  # the headers in VRAM still say what they said
    world.restart_manager()
    for client in world.living:
        world.connect(client)
    assert hits(world, ONE, 0, 8) == gauges(world)["chunks"] == gauges(world)["slots_used"] == 8
    assert gauges(world)["slots_free"] == 16 - 8


def test_after_a_restart_in_the_middle_of_a_move_its_end_does_no_harm(world):
    store(world, ONE, 0, 8)
    mover = world.clients[0]
    _, flights = planned(world, 3 * 256)
    leave(world, mover, flights[:1])
    world.write(flights[1])
    world.restart_manager()
    for client in reversed(world.living):
        world.connect(client)
    assert hits(world, ONE, 0, 8) == 8
    results = world.directory.put_end(mover.id, [flight.ticket for flight in flights], world.now)
    assert results[1:] == [False, False]  # the first is the copy that was kept, or not
    assert gauges(world)["slots_used"] == 8
    assert gauges(world)["slots_quarantined"] == 0


# Bounds and checks


def test_evictions_for_one_slot_are_bounded(world, monkeypatch):
    monkeypatch.setattr(demoting, "EVICTION_ATTEMPTS", 0)
    store(world, ONE, 0, 8)
    assert demote(world) == []


def test_integrity_notices_a_move_that_nobody_remembers(world):
    store(world, ONE, 0, 8)
    planned(world, 0)
    moves = world.directory._state.writes.moves
    write = next(iter(moves))
    del moves[write]
    with pytest.raises(IntegrityError, match="moves"):
        world.directory.check_integrity()
    moves[write] = None
