"""Removing for good: wiped headers, formats that slabs had before, lenders that were away."""

from __future__ import annotations

import os

import pytest
from directory_cases import BIG, ME, ONE, TWO, gauges, header, hits, lone, slab_of, store
from directory_world import CONFIG, World

from vcache.manager.directory.wiping import WIPE_BATCH
from vcache.segment.slots import (
    slab_bytes_for,
    slab_geometry,
)

# Removing


def test_removed_chunks_are_wiped_before_their_slots_are_used_again(world):
    store(world, ONE, 0, 8)
    reply = world.directory.remove(world.clients[0].id, ONE.keys(0, 8)[4:], world.now)
    assert reply.removed == 4
    assert len(reply.tokens) == 1
    assert world.directory.outstanding(reply.tokens)
    assert gauges(world)["slots_quarantined"] == 4
    assert hits(world, ONE, 0, 8) == 4
    world.acquire(world.clients[1], ONE, 0, 0, 4)
    world.settle()
    assert world.put(world.clients[0], ONE, 2, 0, 1)[0].status == "no_space"
    world.directory.wiped(world.clients[0].id, reply.tokens[0], world.now)
    assert world.directory.outstanding(reply.tokens)
    world.wipe(world.clients[2])
    assert not world.directory.outstanding(reply.tokens)
    assert world.put(world.clients[0], ONE, 2, 0, 1)[0].status == "granted"
    world.directory.wiped(world.clients[2].id, reply.tokens[0], world.now)


def test_removed_stays_removed_after_a_restart(world):
    store(world, ONE, 0, 4)
    store(world, TWO, 0, 1, shard=0)
    store(world, TWO, 0, 1, shard=1)
    world.remove(world.clients[0], ONE, 0, 2)
    world.remove(world.clients[0], TWO, 0, 0)
    world.wipe(world.clients[2])
    world.restart_manager()
    for client in world.clients:
        world.connect(client)
    assert (hits(world, ONE, 0, 4), hits(world, TWO, 0, 1)) == (2, 0)


def test_leased_chunks_are_not_removed_but_cleared(world):
    store(world, ONE, 0, 2)
    lease = world.acquire(world.clients[1], ONE, 0, 0, 1)
    assert world.directory.remove(world.clients[0].id, ONE.keys(0, 2), world.now).removed == 1
    assert hits(world, ONE, 0, 1) == 1
    assert world.directory.clear(world.clients[0].id, b"", world.now).removed == 1
    assert hits(world, ONE, 0, 1) == 0
    world.directory.check_integrity()
    world.directory.release(world.clients[1].id, lease, world.now)
    assert not world.directory._state.chunks.ghosts


def test_clear_of_one_namespace(world):
    store(world, ONE, 0, 2)
    store(world, BIG, 0, 1)
    reply = world.directory.clear(world.clients[0].id, ONE.namespace, world.now)
    assert reply.removed == 2
    assert (hits(world, ONE, 0, 2), hits(world, BIG, 0, 1)) == (0, 1)
    for client in world.clients:
        world.wipe(client)
    assert world.directory.clear(world.clients[0].id, b"?" * 16, world.now) == (0, [])


def test_evicted_copies_are_wiped_too(world):
    """Eviction leaves the header, which a restart would bring back to life."""
    store(world, ONE, 0, 8)
    world.advance(1)
    client = world.clients[0]
    world.put(client, ONE, 2, 0, 2)
    victims = [key for key in ONE.keys(0, 8) if key not in world.directory._state.chunks.visible]
    assert len(victims) == 2
    for flight in list(client.flights):
        world.revoke(client, flight)
    reply = world.directory.remove(client.id, victims, world.now)
    assert reply.removed == 0
    assert world.directory.outstanding(reply.tokens)
    world.settle()
    world.wipe(world.clients[2])
    world.restart_manager()
    for other in world.clients:
        world.connect(other)
    assert hits(world, ONE, 0, 8) == 6


def test_removal_waits_for_a_writer_in_the_same_slot(world):
    """The evicted copy lies under a write that has not begun: it is overwritten, or wiped when the write comes to nothing."""
    store(world, ONE, 0, 8)
    world.advance(1)
    client = world.clients[0]
    world.put(client, ONE, 2, 0, 1)
    victim = next(key for key in ONE.keys(0, 8) if key not in world.directory._state.chunks.visible)
    reply = world.directory.remove(client.id, [victim], world.now)
    assert world.directory.outstanding(reply.tokens)
    world.settle()
    assert world.clients[2].wipes == []
    world.revoke(client, client.flights[0])
    assert len(world.clients[2].wipes) == 1
    world.wipe(world.clients[2])
    assert not world.directory.outstanding(reply.tokens)


def begin_new_format(world: World) -> list[bytes]:
    """Small chunks everywhere; then one of the slabs is given to a big one, whose writer has not begun. Keys that went."""
    store(world, ONE, 0, 8)
    world.advance(1)
    world.put(world.clients[0], BIG, 0, 0, 1)
    gone = [key for key in ONE.keys(0, 8) if key not in world.directory._state.chunks.visible]
    assert len(gone) == 4
    return gone


def restarted_hits(world: World) -> list[bytes]:
    world.restart_manager()
    for client in world.clients:
        world.connect(client)
    return [key for key in ONE.keys(0, 8) if key in world.directory._state.chunks.visible]


def test_what_an_old_format_left_is_wiped_once_the_slab_is_empty(world):
    gone = begin_new_format(world)
    client, lender = world.clients[0], world.clients[2]
    reply = world.directory.remove(client.id, gone, world.now)
    world.settle()
    assert world.directory.outstanding(reply.tokens)
    assert lender.wipes == []
    world.revoke(client, client.flights[0])
    assert [len(push.slots) for push in lender.wipes] == [4]
    world.wipe(lender)
    assert not world.directory.outstanding(reply.tokens)
    assert len(restarted_hits(world)) == 4


def test_what_an_old_format_left_in_an_empty_slab_is_wiped_at_once(world):
    gone = begin_new_format(world)
    client, lender = world.clients[0], world.clients[2]
    world.revoke(client, client.flights[0])
    reply = world.directory.remove(client.id, gone, world.now)
    world.settle()
    assert world.directory.outstanding(reply.tokens)
    assert gauges(world)["slots_quarantined"] == 2
    world.wipe(lender)
    assert not world.directory.outstanding(reply.tokens)
    assert len(restarted_hits(world)) == 4


def test_what_an_old_format_left_comes_back_unless_removed(world):
    """It does no harm: content is addressed by key."""
    begin_new_format(world)
    world.revoke(world.clients[0], world.clients[0].flights[0])
    assert len(restarted_hits(world)) == 8


@pytest.mark.parametrize("late", [False, True])
def test_a_completed_write_voids_the_old_format(world, late):
    gone = begin_new_format(world)
    client = world.clients[0]
    if late:
        world.advance(CONFIG["ticket_ttl"])
    assert world.finish(client, list(client.flights)) == [not late]
    assert world.directory.remove(client.id, gone, world.now) == (0, [])
    assert len(restarted_hits(world)) == 4


def test_a_write_that_completed_too_late_is_removed_for_good_too(world):
    client = world.clients[0]
    world.put(client, ONE, 0, 0, 1)
    world.advance(CONFIG["ticket_ttl"])
    assert world.finish(client, list(client.flights)) == [False]
    reply = world.directory.remove(client.id, ONE.keys(0, 1), world.now)
    assert reply.removed == 0
    assert world.directory.outstanding(reply.tokens)
    world.settle()
    world.wipe(world.clients[2])
    assert restarted_hits(world) == []


@pytest.mark.parametrize("namespace", [b"", ONE.namespace])
def test_a_clear_reaches_a_lender_that_was_away(world, namespace):
    store(world, ONE, 0, 4)
    lender = world.clients[2]
    world.disconnect(lender)
    world.directory.clear(world.clients[0].id, namespace, world.now)
    world.connect(lender)
    assert hits(world, ONE, 0, 4) == 0


def test_a_removal_under_way_outlives_the_lenders_absence(world):
    store(world, ONE, 0, 4)
    lender = world.clients[2]
    world.directory.clear(world.clients[0].id, b"", world.now)
    world.disconnect(lender)
    world.connect(lender)
    assert hits(world, ONE, 0, 4) == 0
    assert len(lender.wipes) == 1


def test_removal_reaches_a_lender_that_was_away(world):
    store(world, ONE, 0, 4)
    lender = world.clients[2]
    world.disconnect(lender)
    world.remove(world.clients[0], ONE, 0, 1)
    world.connect(lender)
    assert hits(world, ONE, 0, 4) == 1
    assert len(lender.wipes) == 1
    world.wipe(lender)
    world.disconnect(lender)
    world.connect(lender)
    assert (hits(world, ONE, 0, 4), lender.wipes) == (1, [])


def test_a_lender_that_goes_does_not_keep_a_removal_waiting(world):
    store(world, ONE, 0, 4)
    reply = world.directory.clear(world.clients[0].id, b"", world.now)
    assert world.directory.outstanding(reply.tokens)
    world.disconnect(world.clients[2])
    assert not world.directory.outstanding(reply.tokens)


def test_many_wipes_come_in_bounded_messages():
    count = 2500
    nbytes = slab_bytes_for(256, count)
    directory, info = lone(nbytes=nbytes)
    headers = [header(key=os.urandom(16), generation=20 + 2 * i) for i in range(count)]
    directory.mount(ME, info, [slab_of(*headers, slots=slab_geometry(nbytes, 256).slots)], 0.0)
    assert directory.stats(0.0).gauges["chunks"] == count
    directory.take_instructions()
    reply = directory.clear(ME, b"", 0.0)
    assert reply.removed == count
    sizes = [len(push.slots) for _, push in directory.take_instructions()]
    assert (len(sizes), sum(sizes)) == (len(reply.tokens), count)
    assert max(sizes) <= WIPE_BATCH
    for token in reply.tokens:
        directory.wiped(ME, token, 0.0)
    assert directory.stats(0.0).gauges["slots_quarantined"] == 0
    directory.check_integrity()
