"""Reading, leases and two-phase puts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from directory_world import CONFIG, SLAB_BYTES, TOKENS, VARIANTS, World, digest
from driven import Driven

from vcache.config import ManagerConfig
from vcache.errors import IntegrityError, ManagerRefusedError, ProtocolError
from vcache.manager import wire
from vcache.manager.api import PutRequest, Ticket
from vcache.segment.slots import LOCATION_BYTES, SlotLocation

ONE, TWO, BIG = VARIANTS


@pytest.fixture(params=["lru", "sieve"])
def world(request) -> Iterator[World]:
    """Two engines (0, 1) and one lender (2) with two slabs of four small slots."""
    world = World(request.param, engines=2, lenders=1, slabs=2)
    yield world
    world.directory.check_integrity()
    world.verify_all()


def store(world: World, variant, prompt: int, count: int, start: int = 0, shard: int = 0, writer: int = 0) -> list[str]:
    client = world.clients[writer]
    before = list(client.flights)
    grants = world.put(client, variant, prompt, start, count, shard)
    assert all(world.finish(client, [flight for flight in client.flights if flight not in before]))
    return [grant.status for grant in grants]


def hits(world: World, variant, prompt: int, count: int, reader: int = 1) -> int:
    return world.directory.lookup(world.clients[reader].id, variant.keys(prompt, count), world.now)


def counters(world: World) -> dict[str, int]:
    return world.directory.stats(world.now).counters


def gauges(world: World) -> dict[str, int]:
    return world.directory.stats(world.now).gauges


# Visibility


def test_a_chunk_is_visible_only_after_its_end(world):
    world.put(world.clients[0], ONE, 0, 0, 2)
    assert hits(world, ONE, 0, 2) == 0
    first, second = world.clients[0].flights
    world.finish(world.clients[0], [second])
    assert hits(world, ONE, 0, 2) == 0
    world.finish(world.clients[0], [first])
    assert hits(world, ONE, 0, 2) == 2


def test_a_prefix_ends_at_the_first_miss(world):
    store(world, ONE, 0, 2)
    store(world, ONE, 0, 2, start=3)
    assert hits(world, ONE, 0, 5) == 2
    assert world.directory.tiers(world.clients[0].id, ONE.keys(0, 6), world.now) == [0, 0, -1, 0, 0, -1]
    assert world.directory.lookup(world.clients[0].id, [], world.now) == 0


def test_a_sharded_chunk_hits_only_with_all_its_shards_from_whichever_client(world):
    store(world, TWO, 0, 2, shard=1, writer=0)
    assert hits(world, TWO, 0, 2) == 0
    store(world, TWO, 0, 1, shard=0, writer=1)
    assert hits(world, TWO, 0, 2) == 1
    reader = world.clients[0].id
    for shard in range(2):
        reply = world.directory.acquire(reader, TWO.keys(0, 2), shard, 0, world.now)
        world.verify(TWO.namespace, TWO.keys(0, 1)[0], shard, reply.locations[0])
        assert len(reply.locations) == 1
        world.directory.release(reader, reply.lease, world.now)
    assert world.directory.acquire(reader, TWO.keys(0, 2), 2, 0, world.now) == (0, 0.0, [])


def test_packed_and_unpacked_replies_agree(world):
    store(world, ONE, 0, 3)
    client = world.clients[1].id
    keys = ONE.keys(0, 4)
    lease, expires_in, packed = world.directory.acquire_packed(client, keys, 0, 0, world.now)
    assert (lease, expires_in, len(packed)) == (world.epoch + 1, CONFIG["lease_ttl"], 3 * LOCATION_BYTES)
    again = world.directory.acquire(client, keys, 0, lease, world.now + 1)
    assert again == (lease, CONFIG["lease_ttl"] - 1, SlotLocation.unpack_many(packed))
    assert [location.tokens for location in again.locations] == [TOKENS] * 3


# Leases


def test_leased_chunks_are_not_evicted_until_released(world):
    store(world, ONE, 0, 4)
    lease = world.acquire(world.clients[1], ONE, 0, 0, 4)
    assert store(world, ONE, 2, 6) == ["granted"] * 4 + ["no_space"] * 2
    assert hits(world, ONE, 0, 4) == 4
    world.release(lease)
    assert store(world, ONE, 2, 6) == ["exists"] * 4 + ["granted"] * 2
    assert hits(world, ONE, 0, 4) == 2


def test_a_lease_expires(world):
    store(world, ONE, 0, 4)
    lease = world.acquire(world.clients[1], ONE, 0, 0, 4)
    assert world.directory.next_deadline() == world.now + CONFIG["lease_ttl"]
    world.now += CONFIG["lease_ttl"]
    assert world.directory.acquire(world.clients[1].id, ONE.keys(0, 4), 0, lease, world.now).lease == 0
    world.advance(0)
    assert counters(world)["lease_expiries"] == 1
    assert gauges(world)["leases"] == 0
    assert store(world, ONE, 2, 6) == ["granted"] * 6


def test_a_lease_locates_only_what_it_covers(world):
    store(world, ONE, 0, 4)
    client = world.clients[1]
    lease = world.directory.acquire(client.id, ONE.keys(0, 2), 0, 0, world.now).lease
    assert len(world.directory.acquire(client.id, ONE.keys(0, 4), 0, lease, world.now).locations) == 2
    assert world.directory.acquire(client.id, ONE.keys(0, 4)[2:], 0, lease, world.now).lease == 0
    stranger = world.directory.acquire(world.clients[0].id, ONE.keys(0, 2), 0, lease, world.now)
    assert stranger == (0, 0.0, [])
    assert world.directory.acquire(client.id, ONE.keys(0, 2), 0, 999, world.now).locations == []
    count = counters(world)
    assert (count["hits"], count["errors"], count["misses"]) == (4, 4, 4)


def test_release_is_idempotent_and_only_for_the_holder(world):
    store(world, ONE, 0, 1)
    first = world.directory.acquire(world.clients[1].id, ONE.keys(0, 1), 0, 0, world.now).lease
    second = world.directory.acquire(world.clients[1].id, ONE.keys(0, 1), 0, 0, world.now).lease
    assert first != second
    world.directory.release(world.clients[0].id, first, world.now)
    assert gauges(world)["leases"] == 2
    for _ in range(2):
        world.directory.release(world.clients[1].id, first, world.now)
    assert gauges(world)["leases"] == 1
    world.directory.release(world.clients[1].id, 12345, world.now)


def test_a_miss_takes_no_lease(world):
    assert world.directory.acquire(world.clients[0].id, ONE.keys(0, 3), 0, 0, world.now) == (0, 0.0, [])
    assert gauges(world)["leases"] == 0


def test_a_key_named_twice_is_pinned_twice(world):
    store(world, ONE, 0, 1)
    reply = world.directory.acquire(world.clients[0].id, ONE.keys(0, 1) * 2, 0, 0, world.now)
    assert len(reply.locations) == 2
    world.directory.check_integrity()
    world.directory.release(world.clients[0].id, reply.lease, world.now)


def test_lookups_are_hits_plus_misses_plus_errors(world):
    store(world, ONE, 0, 2)
    client = world.clients[0].id
    world.directory.lookup(client, ONE.keys(0, 5), world.now)
    world.directory.acquire(client, ONE.keys(0, 3), 0, 0, world.now)
    world.directory.acquire(client, ONE.keys(0, 3), 0, 77, world.now)
    world.directory.acquire(client, ONE.keys(0, 2), 1, 0, world.now)
    count = counters(world)
    assert (count["lookups"], count["hits"], count["misses"], count["errors"]) == (13, 4, 6, 3)
    world.directory._state.counters.hits += 1
    with pytest.raises(IntegrityError, match="I10"):
        world.directory.check_integrity()
    world.directory._state.counters.hits -= 1


# Puts


def test_statuses(world):
    store(world, ONE, 0, 1)
    assert [grant.status for grant in world.put(world.clients[0], ONE, 0, 0, 2)] == ["exists", "granted"]
    assert [grant.status for grant in world.put(world.clients[1], ONE, 0, 0, 3)] == ["exists", "busy", "granted"]
    assert [grant.status for grant in world.put(world.clients[0], ONE, 2, 0, 6)] == ["granted"] * 5 + ["no_space"]


def test_a_shard_that_waits_for_the_others_exists(world):
    store(world, TWO, 0, 1, shard=0)
    assert store(world, TWO, 0, 1, shard=0) == ["exists"]
    assert store(world, TWO, 0, 1, shard=1) == ["granted"]


def test_a_key_named_twice_is_granted_once(world):
    key = digest("twice")
    request = PutRequest(
        keys=[key, key], namespace=ONE.namespace, parent=b"", first_index=0, tokens=[1, 1], slot_bytes=256, device="host"
    )
    grants = world.directory.put_start(world.clients[0].id, request, world.now)
    assert [grant.status for grant in grants] == ["granted", "busy"]
    ticket = Ticket(key, 0, grants[0].location.generation)
    world.directory.put_revoke(world.clients[0].id, [ticket], world.now)


def test_end_is_idempotent_and_only_for_the_writer(world):
    client = world.clients[0]
    world.put(client, ONE, 0, 0, 1)
    (flight,) = client.flights
    ticket = flight.ticket
    assert world.directory.put_end(world.clients[1].id, [ticket], world.now) == [False]
    assert world.finish(client, [flight]) == [True]
    assert world.directory.put_end(client.id, [ticket, ticket], world.now) == [True, True]
    assert world.directory.put_end(client.id, [Ticket(ticket.key, 1, ticket.generation)], world.now) == [False]
    assert world.directory.put_end(client.id, [Ticket(ticket.key, 0, ticket.generation + 2)], world.now) == [False]


def test_a_revoked_slot_is_free_at_once(world):
    client = world.clients[0]
    world.put(client, ONE, 0, 0, 3)
    assert gauges(world)["slots_processing"] == 3
    tickets = [flight.ticket for flight in client.flights]
    for _ in range(2):
        world.directory.put_revoke(client.id, tickets, world.now)
    client.flights.clear()
    assert gauges(world)["slots_processing"] == 0
    assert counters(world)["revocations"] == 3
    assert store(world, ONE, 0, 3, writer=1) == ["granted"] * 3


def test_a_late_end_frees_the_slot_but_publishes_nothing(world):
    """The ticket lapses: others may write the key elsewhere, nobody the slot (the world checks that)."""
    slow = world.clients[0]
    world.put(slow, ONE, 0, 0, 2)
    world.advance(CONFIG["ticket_ttl"] - 0.5)
    assert store(world, ONE, 0, 2, writer=1) == ["busy"] * 2
    world.advance(1)
    assert gauges(world)["slots_quarantined"] == 2
    assert store(world, ONE, 0, 2, writer=1) == ["granted"] * 2
    assert store(world, ONE, 2, 6, writer=1) == ["granted"] * 6
    assert gauges(world)["slots_quarantined"] == 2
    assert world.finish(slow, list(slow.flights)) == [False, False]
    assert (gauges(world)["slots_quarantined"], counters(world)["late_ends"]) == (0, 2)
    assert hits(world, ONE, 2, 6) == 6


def test_an_incomplete_sharded_chunk_gives_its_slots_back(world):
    store(world, TWO, 0, 2, shard=0)
    world.put(world.clients[1], TWO, 0, 0, 1, 1)
    world.advance(CONFIG["ticket_ttl"])
    assert (gauges(world)["slots_used"], gauges(world)["chunks_pending"]) == (0, 0)
    assert counters(world)["incomplete"] == 2
    assert gauges(world)["slots_quarantined"] == 1


def test_removing_one_shard_frees_all(world):
    store(world, TWO, 0, 1, shard=0)
    store(world, TWO, 0, 1, shard=1)
    assert gauges(world)["slots_used"] == 2
    store(world, ONE, 2, 7)
    assert hits(world, TWO, 0, 1) == 0
    assert gauges(world)["slots_used"] == 7


# Eviction


def test_what_is_stored_first_goes_first_and_from_its_tail(world):
    store(world, ONE, 0, 4)
    world.advance(1)
    store(world, ONE, 2, 4)
    world.advance(1)
    store(world, ONE, 3, 2)
    assert (hits(world, ONE, 0, 4), hits(world, ONE, 2, 4), hits(world, ONE, 3, 2)) == (2, 4, 2)
    assert counters(world)["evictions"] == 2


def test_a_prompt_does_not_push_out_its_own_head(world):
    store(world, ONE, 0, 4)
    assert store(world, ONE, 0, 5, start=4) == ["granted"] * 4 + ["no_space"]
    assert hits(world, ONE, 0, 9) == 8


def test_the_parent_named_in_a_request_is_protected_too(world):
    store(world, ONE, 0, 1)
    world.advance(1)
    store(world, ONE, 0, 1, start=1)
    world.advance(1)
    assert store(world, ONE, 2, 7) == ["granted"] * 7
    assert (hits(world, ONE, 0, 2), hits(world, ONE, 2, 7)) == (1, 7)


def test_a_child_counts_even_if_its_parent_comes_back_later(world):
    """The head went (with its slab); stored again, it still goes after the tail that stayed."""
    store(world, ONE, 0, 2, start=1)
    world.advance(1)
    store(world, ONE, 0, 1)
    record = world.directory._state.chunks.visible[ONE.keys(0, 1)[0]]
    assert record.children == 1
    world.advance(1)
    store(world, ONE, 2, 7)
    assert hits(world, ONE, 0, 3) == 1


def test_impossible_parents_are_ignored(world):
    """Two chunks that name each other as parents must not become immortal."""
    a, b = digest("a"), digest("b")
    client = world.clients[0].id
    for key, parent, index in ((a, b, 1), (b, a, 1), (a, a, 1), (b, a, 2)):
        request = PutRequest(
            keys=[key], namespace=ONE.namespace, parent=parent, first_index=index, tokens=[1], slot_bytes=256, device="host"
        )
        for grant in world.directory.put_start(client, request, world.now):
            if grant.location is not None:
                world.directory.put_end(client, [Ticket(key, 0, grant.location.generation)], world.now)
        world.directory.check_integrity()
    world.advance(1)
    assert store(world, ONE, 2, 8) == ["granted"] * 8
    assert not world.directory._state.chunks.ghosts


def test_published_and_used_chunks_queue_tail_first(world):
    store(world, ONE, 0, 3)
    store(world, ONE, 2, 1)
    hits(world, ONE, 0, 3)
    (queue,) = world.directory._state.chunks.policy.queues.values()
    names = {key: name for name, key in zip("abcx", [*ONE.keys(0, 3), *ONE.keys(2, 1)], strict=True)}
    assert "".join(names[record.key] for record in queue) == ("xcba" if world.eviction == "lru" else "cbax")


def test_a_cold_slab_of_another_slot_size_is_emptied_and_formatted_again(world):
    store(world, ONE, 0, 8)
    world.advance(1)
    assert store(world, BIG, 0, 2) == ["granted"] * 2
    assert (counters(world)["slab_reclaims"], counters(world)["evictions"]) == (1, 4)
    world.advance(1)
    hits(world, ONE, 0, 8)
    world.advance(1)
    hits(world, BIG, 0, 2)
    world.advance(1)
    # Now the big ones' own slab is the only cold one, then everything in use is hotter than what is asked for.
    assert store(world, BIG, 2, 2) == ["granted"] * 2


@pytest.mark.parametrize(("hot", "reclaims"), [(1, 1), (3, 0)])
def test_a_slab_with_mostly_hot_chunks_is_not_emptied_for_its_one_cold_chunk(world, hot, reclaims):
    for prompt in (0, 2, 3, 4):
        store(world, ONE, prompt, 1)
    world.advance(1)
    store(world, BIG, 0, 2)
    world.advance(1)
    for prompt in (0, 2, 3)[:hot]:
        hits(world, ONE, prompt, 1)
    world.advance(1)
    assert store(world, BIG, 2, 1) == ["granted"]
    assert counters(world)["slab_reclaims"] == reclaims


def test_a_leased_slab_is_not_reclaimed(world):
    store(world, ONE, 0, 8)
    lease = world.acquire(world.clients[1], ONE, 0, 0, 8)
    assert store(world, BIG, 0, 1) == ["no_space"]
    world.release(lease)
    assert store(world, BIG, 0, 1) == ["granted"]


def test_a_slab_in_which_somebody_writes_is_not_reclaimed(world):
    store(world, ONE, 0, 6)
    world.put(world.clients[1], ONE, 2, 0, 2)
    assert store(world, BIG, 0, 4) == ["granted"] * 2 + ["no_space"] * 2


def test_avoided_segments_get_nothing_and_lose_nothing(world):
    store(world, ONE, 0, 8)
    grants = world.put(world.clients[0], ONE, 2, 0, 1, avoid=[1])
    assert grants[0].status == "no_space"
    assert hits(world, ONE, 0, 8) == 8


# Refusals


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [1, 2]},
        {"tokens": [0]},
        {"tokens": [2**16]},
        {"keys": [b"short"]},
        {"namespace": b""},
        {"parent": b"x"},
        {"first_index": -1},
        {"first_index": 2**32},
        {"shard": 1},
        {"shard": -1},
        {"num_shards": 2**16},
        {"slot_bytes": 0},
        {"slot_bytes": 2**41},
    ],
)
def test_impossible_requests_are_refused_and_change_nothing(world, change):
    fields = {
        "keys": [digest("k")],
        "namespace": ONE.namespace,
        "parent": b"",
        "first_index": 0,
        "tokens": [1],
        "slot_bytes": 256,
    } | change
    with pytest.raises(ProtocolError):
        world.directory.put_start(world.clients[0].id, PutRequest(**fields), world.now)
    assert gauges(world)["slots_processing"] == gauges(world)["chunks_pending"] == 0


def test_without_a_session_nothing_is_answered(world):
    stranger = digest("stranger")
    for call in (
        lambda d: d.lookup(stranger, [], 0),
        lambda d: d.acquire(stranger, [], 0, 0, 0),
        lambda d: d.release(stranger, 1, 0),
        lambda d: d.put_end(stranger, [], 0),
        lambda d: d.put_revoke(stranger, [], 0),
        lambda d: d.remove(stranger, [], 0),
        lambda d: d.clear(stranger, b"", 0),
        lambda d: d.heartbeat(stranger, 0),
        lambda d: d.drop_slabs(stranger, b"u" * 16, SLAB_BYTES, 0),
    ):
        with pytest.raises(ManagerRefusedError, match="hello"):
            call(world.directory)


def test_two_slabs_never_give_one_writer_the_same_ticket(world):
    """Generations count per slab, so a lapsed ticket could share its name with a new one in another slab."""
    slow = world.clients[0]
    store(world, ONE, 2, 3, writer=1)
    world.put(slow, ONE, 0, 0, 1)
    old = slow.flights[0]
    world.advance(CONFIG["ticket_ttl"])
    other = next(slab for slab in world.directory._state.allocator.slabs.values() if slab.index != old.slab)
    other.counter = old.header.generation - 4  # it is formatted (+2) and hands out the next (+2)
    world.put(slow, ONE, 0, 0, 1)
    new = slow.flights[1]
    assert new.slab == other.index
    assert new.ticket != old.ticket
    assert world.finish(slow, [old, new]) == [False, True]


def test_every_verb_has_its_handler_and_nothing_else_has_one():
    assert set(Driven(ManagerConfig(), epoch=2)._handlers) == set(wire.VERBS)
