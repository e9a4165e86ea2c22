"""Sessions, quarantine, manager restart: what happens to writes and leases of clients that vanish."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from directory_world import CONFIG, MAX_CHUNKS, VARIANTS, World, digest

from vcache.errors import IntegrityError, ProtocolError
from vcache.manager.api import SegmentGone, SegmentMounted, WriterLost
from vcache.manager.directory import lending

ONE, TWO, BIG = VARIANTS


@pytest.fixture
def world() -> Iterator[World]:
    """Two engines (0, 1) and one lender (2) with two slabs of four small slots."""
    world = World("sieve", engines=2, lenders=1, slabs=2)
    yield world
    world.directory.check_integrity()
    world.verify_all()


def gauges(world: World) -> dict[str, int]:
    return world.directory.stats(world.now).gauges


def fill(world: World, writer: int = 0, count: int = 8) -> None:
    world.put(world.clients[writer], ONE, 2, 0, count)
    assert all(world.finish(world.clients[writer], list(world.clients[writer].flights)))


def test_hello_tells_the_session_and_the_segments(world):
    session = world.directory.open_session(digest("new"), "n", "tool", world.now)
    assert (session.epoch, session.heartbeat_interval, session.session_timeout) == (world.epoch, 1.0, CONFIG["session_timeout"])
    ((target, push),) = world.directory.take_instructions()
    assert (target, push.info) == (digest("new"), world.directory.segments()[0])
    assert world.directory.take_instructions() == []
    with pytest.raises(ProtocolError):
        world.directory.open_session(b"short", "n", "tool", world.now)


def test_silence_ends_a_session_and_tells_the_server(world):
    quiet = world.clients[0]
    world.put(quiet, ONE, 0, 0, 1)
    world.advance(0)
    for _ in range(2):
        world.now += CONFIG["session_timeout"] / 2
        for other in world.clients[1:]:
            world.directory.heartbeat(other.id, world.now)
    assert world.directory.next_deadline() <= world.now
    world.directory.tick(world.now)
    assert (quiet.id, None) in world.directory.take_instructions()
    assert not world.directory.has_session(quiet.id)
    assert world.directory.has_session(world.clients[1].id)
    quiet.connected = False
    assert gauges(world)["slots_quarantined"] == 1


def test_a_disconnect_drops_leases_and_quarantines_writes(world):
    fill(world, count=4)
    writer = world.clients[0]
    world.acquire(writer, ONE, 2, 0, 4)
    world.put(writer, ONE, 0, 0, 2)
    world.disconnect(writer)
    assert (gauges(world)["leases"], gauges(world)["slots_quarantined"], gauges(world)["chunks_pending"]) == (0, 2, 0)
    # The keys may be written by others, the slots may not (the world checks that).
    world.put(world.clients[1], ONE, 0, 0, 6)
    assert world.clients[2].lost == {writer.id: None}


def test_hello_frees_what_the_client_wrote_before(world):
    writer = world.clients[0]
    world.put(writer, ONE, 0, 0, 2)
    world.write(writer.flights[0])
    world.disconnect(writer)
    world.advance(100)
    assert gauges(world)["slots_quarantined"] == 2
    world.connect(writer)
    assert gauges(world)["slots_quarantined"] == 0


def test_goodbye_frees_at_once_also_what_had_lapsed(world):
    writer = world.clients[0]
    world.put(writer, ONE, 0, 0, 1)
    world.advance(CONFIG["ticket_ttl"])
    world.put(writer, ONE, 0, 0, 2)
    assert (gauges(world)["slots_quarantined"], gauges(world)["slots_processing"]) == (1, 2)
    world.goodbye(writer)
    assert (gauges(world)["slots_quarantined"], gauges(world)["slots_processing"]) == (0, 0)


def test_a_dead_writer_holds_its_slots_until_the_lender_vouches_and_the_quarantine_is_over(world):
    writer, lender = world.clients[0], world.clients[2]
    world.put(writer, ONE, 0, 0, 2)
    world.write(writer.flights[0])
    world.kill(writer)
    world.advance(100)
    assert gauges(world)["slots_quarantined"] == 2
    world.importer_gone(lender, writer.id)
    world.advance(CONFIG["quarantine"] - 0.5)
    world.importer_gone(lender, writer.id)
    assert gauges(world)["slots_quarantined"] == 2
    world.advance(0.5)
    assert gauges(world)["slots_quarantined"] == 0


def test_importer_gone_before_the_session_is_seen_to_end(world):
    writer, lender = world.clients[0], world.clients[2]
    world.put(writer, ONE, 0, 0, 1)
    world.directory.importer_gone(lender.id, lender.uuid, writer.id, world.now)
    assert (gauges(world)["slots_processing"], gauges(world)["slots_quarantined"]) == (0, 1)
    world.kill(writer)
    world.gone.clear()
    world.advance(CONFIG["quarantine"])
    assert gauges(world)["slots_quarantined"] == 0


def test_a_quarantine_that_was_cut_short_does_not_free_the_next_writers_slot(world):
    first, second, lender = world.clients
    world.put(first, ONE, 0, 0, 8)
    world.directory.importer_gone(lender.id, lender.uuid, first.id, world.now)
    world.connect(first)
    world.put(second, ONE, 2, 0, 8)
    world.advance(CONFIG["quarantine"])
    assert gauges(world)["slots_processing"] == 8
    assert world.finish(second, list(second.flights)) == [True] * 8


def test_a_dead_writers_shard_takes_the_other_shards_down_in_time(world):
    other, writer = world.clients[0], world.clients[1]
    world.put(other, TWO, 0, 0, 2, shard=0)
    world.finish(other, list(other.flights))
    world.put(writer, TWO, 0, 0, 2, shard=1)
    world.kill(writer)
    assert gauges(world)["slots_used"] == 2
    world.advance(CONFIG["ticket_ttl"])
    assert gauges(world)["slots_used"] == 0


def test_a_second_hello_replaces_the_session(world):
    fill(world)
    world.acquire(world.clients[0], ONE, 2, 0, 8)
    world.connect(world.clients[0])
    assert gauges(world)["leases"] == 0
    lender = world.clients[2]
    world.connect(lender)
    assert gauges(world)["segments"] == 1
    assert world.directory.lookup(world.clients[0].id, ONE.keys(2, 8), world.now) == 8


def test_sessions_that_end_twice_or_never_were(world):
    before = gauges(world)["sessions"]
    world.directory.close_session(digest("nobody"), world.now)
    assert gauges(world)["sessions"] == before
    world.disconnect(world.clients[0])
    world.directory.close_session(world.clients[0].id, world.now, goodbye=True)
    assert gauges(world)["sessions"] == before - 1
    world.directory.check_integrity()


def test_a_lender_that_vanishes_makes_misses_and_nothing_else(world):
    fill(world)
    world.put(world.clients[1], TWO, 0, 0, 1)
    lender = world.clients[2]
    world.directory.close_session(lender.id, world.now)
    pushes = world.directory.take_instructions()
    assert [(target, type(push)) for target, push in pushes] == [(None, SegmentGone)]
    lender.connected = False
    assert gauges(world)["chunks"] == gauges(world)["segments"] == 0
    assert [grant.status for grant in world.put(world.clients[0], ONE, 0, 0, 1)] == ["no_space"]


def test_a_lender_that_comes_back_brings_its_chunks_and_the_writes_under_way(world):
    """The writer has not even begun, so nothing in memory tells of it; the directory remembers."""
    writer, lender = world.clients[0], world.clients[2]
    world.put(writer, ONE, 2, 0, 6)
    world.finish(writer, list(writer.flights))
    world.put(writer, ONE, 0, 0, 1)
    world.disconnect(lender)
    world.connect(lender)
    assert gauges(world)["chunks"] == 6
    assert gauges(world)["slots_quarantined"] == 1
    world.put(world.clients[1], ONE, 1, 0, 3)
    assert world.finish(writer, list(writer.flights)) == [], "the gate lets a ticket of an earlier mount begin"
    assert gauges(world)["slots_quarantined"] == 0


def test_a_write_under_way_in_a_new_format_survives_the_lenders_absence(world):
    """The memory still shows the old format when the lender is back; the writer may be about to change it."""
    writer, lender = world.clients[0], world.clients[2]
    fill(world)
    world.advance(1)
    world.put(writer, BIG, 0, 0, 1)
    world.disconnect(lender)
    world.connect(lender)
    assert gauges(world)["chunks"] == 4
    world.put(world.clients[1], ONE, 3, 0, 6)
    world.put(world.clients[1], BIG, 3, 0, 2)
    assert world.finish(writer, list(writer.flights)) == [], "the gate lets a ticket of an earlier mount begin"
    world.finish(world.clients[1], list(world.clients[1].flights))


def test_restart_loses_nothing(world):
    fill(world, count=5)
    for shard in range(2):
        world.put(world.clients[shard], TWO, 0, 0, 1, shard=shard)
        world.finish(world.clients[shard], list(world.clients[shard].flights))
    world.restart_manager()
    for client in world.clients:
        world.connect(client)
    reader = world.clients[1].id
    assert world.directory.lookup(reader, ONE.keys(2, 8), world.now) == 5
    assert world.directory.lookup(reader, TWO.keys(0, 1), world.now) == 1
    assert world.directory.stats(world.now).counters["recovered"] == 7


def test_restart_keeps_tails_before_heads(world):
    fill(world, count=8)
    world.restart_manager()
    for client in world.clients:
        world.connect(client)
    for left in range(7, 3, -1):
        world.put(world.clients[0], ONE, 3, 7 - left, 1)
        world.finish(world.clients[0], list(world.clients[0].flights))
        assert world.directory.lookup(world.clients[1].id, ONE.keys(2, 8), world.now) == left


def test_look_ups_teach_a_restarted_manager_the_chains_again(world):
    fill(world, count=4)
    world.restart_manager()
    for client in world.clients:
        world.connect(client)
    chunks = world.directory._state.chunks
    assert chunks.orphans == 3
    world.directory.lookup(world.clients[1].id, ONE.keys(2, 4), world.now)
    assert chunks.orphans == 0
    assert chunks.visible[ONE.keys(2, 1)[0]].children == 1


def test_after_a_restart_an_unfinished_write_waits_for_its_writer(world):
    """And with its slot the other three of its slab: its writer may be amid more than what has a header by now."""
    writer, lender = world.clients[0], world.clients[2]
    world.put(writer, ONE, 0, 0, 2)
    world.write(writer.flights[0])
    world.restart_manager()
    world.connect(lender)
    assert gauges(world)["slots_quarantined"] == 1
    assert lender.lost == {writer.id: None}
    world.connect(world.clients[1])
    world.put(world.clients[1], ONE, 2, 0, 8)
    assert gauges(world)["slots_processing"] == 4
    world.connect(writer)
    assert gauges(world)["slots_quarantined"] == 0


def test_after_a_restart_a_slab_waits_for_a_writer_that_has_written_nothing_yet(world):
    """It has passed the gate with a ticket of the old manager: its header is still to come when the lender mounts."""
    writer, lender = world.clients[0], world.clients[2]
    world.put(writer, ONE, 0, 0, 2)
    assert world.enter(writer.flights[0])
    world.restart_manager()
    world.connect(lender)
    assert not world.enter(writer.flights[1])
    world.connect(world.clients[1])
    world.put(world.clients[1], ONE, 2, 0, 8)
    assert gauges(world)["slots_processing"] == 4
    while world.write(writer.flights[0]):
        pass
    world.advance(0.1)
    world.put(world.clients[1], ONE, 3, 0, 4)
    assert gauges(world)["slots_processing"] == 8


def test_after_a_restart_a_writer_that_said_hello_first_is_not_waited_for(world):
    writer, lender = world.clients[0], world.clients[2]
    world.put(writer, ONE, 0, 0, 1)
    world.write(writer.flights[0])
    writer.flights.clear()
    world.restart_manager()
    world.connect(writer)
    world.connect(lender)
    assert gauges(world)["slots_quarantined"] == 0


def test_after_a_restart_the_lenders_own_unfinished_writes_are_over(world):
    lender = world.clients[2]
    world.put(lender, ONE, 0, 0, 1)
    world.write(lender.flights[0])
    lender.flights.clear()
    world.restart_manager()
    world.connect(lender)
    assert gauges(world)["slots_quarantined"] == 0


def test_generations_go_on_above_all_that_was_seen(world):
    fill(world)
    first = world.directory.acquire(world.clients[1].id, ONE.keys(2, 1), 0, 0, world.now).locations[0]
    world.epoch = -1_000_000
    world.restart_manager()
    assert world.directory.epoch == 0
    for client in world.clients:
        world.connect(client)
    # The world checks that grants are above; here the clock of the new manager had gone back.
    world.put(world.clients[0], ONE, 0, 0, 8)
    assert all(flight.header.generation > first.generation for flight in world.clients[0].flights)


def test_the_other_lenders_are_told_of_a_lost_writer(world):
    world.put(world.clients[0], ONE, 0, 0, 1)
    world.directory.close_session(world.clients[0].id, world.now)
    world.clients[0].connected = False
    lender = world.clients[2]
    assert world.directory.take_instructions() == [(lender.id, WriterLost(segment=lender.uuid, client=world.clients[0].id))]


def test_check_integrity_sees_what_a_session_left_behind(world):
    fill(world, count=1)
    world.acquire(world.clients[0], ONE, 2, 0, 1)
    session = world.directory._state.sessions.pop(world.clients[0].id)
    with pytest.raises(IntegrityError, match="I9"):
        world.directory.check_integrity()
    world.directory._state.sessions[world.clients[0].id] = session
    record = next(iter(world.directory._state.chunks.visible.values()))
    record.leased += 1
    with pytest.raises(IntegrityError, match="I3"):
        world.directory.check_integrity()
    record.leased -= 1
    record.children = 1
    with pytest.raises(IntegrityError, match="children"):
        world.directory.check_integrity()
    record.children = 0


def test_mounting_announces_to_everybody(world):
    lender = world.clients[2]
    world.directory.mount(lender.id, world.info(lender), lender.inventory(lender.slabs), world.now)
    assert [(target, type(push)) for target, push in world.directory.take_instructions()] == [(None, SegmentMounted)]


def test_no_clock_frees_a_slot_whose_lender_and_writer_are_both_away(world):
    """After an hour without its lender the slot of a stopped writer, with a ticket and nothing written yet, counted as free,
    and was given to another when the lender came back: then both wrote there."""
    writer, lender = world.clients[0], world.clients[2]
    world.put(writer, ONE, 0, 0, 1)
    world.disconnect(lender)
    world.disconnect(writer)
    world.advance(100_000.0)
    world.connect(lender)
    assert gauges(world)["slots_quarantined"] == 1
    fill(world, writer=1, count=7)
    assert world.put(world.clients[1], ONE, 0, 0, 1)[0].status == "granted"
    assert len({(flight.slab, flight.slot) for flight in [*writer.flights, *world.clients[1].flights]}) == 2


def test_segments_whose_lender_vanished_are_remembered_in_bounded_number(monkeypatch):
    monkeypatch.setattr(lending, "MAX_AWAY", 2)
    world = World("lru", engines=1, lenders=5, slabs=1)
    writer = world.clients[0]
    world.put(writer, ONE, 0, 0, MAX_CHUNKS)
    world.put(writer, ONE, 2, 0, MAX_CHUNKS)
    for lender in world.clients[1:]:
        world.disconnect(lender)
        world.directory.check_integrity()
    assert len(list(world.directory._lending.away_slabs())) == 2
