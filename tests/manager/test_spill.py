"""Spilling to storage before eviction, and the push that asks engines to make room."""

from __future__ import annotations

import msgspec
import pytest
from directory_cases import BIG, ONE, TWO, gauges, hits, store
from directory_world import CONFIG, SLAB_BYTES, World

from vcache.config import ManagerConfig
from vcache.errors import IntegrityError, ProtocolError
from vcache.manager.api import RoomWanted, SpillPlan
from vcache.manager.directory import spilling
from vcache.manager.directory.directory import Directory
from vcache.manager.directory.eviction import make_policy
from vcache.manager.directory.records import Record
from vcache.manager.directory.slabs import ASK_AGAIN

ALL = 100 * SLAB_BYTES


@pytest.fixture
def world(tiered_world: World) -> World:
    return tiered_world


def counters(world: World) -> dict[str, int]:
    return world.directory.stats(world.now).counters


def keys_of(plan: SpillPlan) -> list[bytes]:
    return list(dict.fromkeys(spill.key for spill in plan.spills))


def spill(world: World, nbytes: int = ALL, spiller: int = 0) -> list[bytes]:
    """Carry out one plan; the chunks that were written."""
    client = world.clients[spiller]
    plan = world.spill(client, nbytes)
    if plan.lease:
        world.spilled(client, plan.lease, keys_of(plan))
    return keys_of(plan)


def fill(world: World) -> None:
    """Prompt 0 in host memory, prompt 2 in VRAM."""
    store(world, ONE, 0, 8, avoid=[1])
    world.advance(1)
    store(world, ONE, 2, 8)
    world.advance(1)


# What is planned


def test_the_coldest_of_the_lowest_tier_go_until_the_rest_is_below_the_low_watermark(world):
    fill(world)
    # Of 16 slots in use, three may hold what is not in storage.
    assert spill(world, 3 * 256) == ONE.keys(0, 8)[:4:-1]
    assert spill(world) == ONE.keys(0, 5)[::-1]
    assert spill(world) == []  # what is in VRAM is not in the lowest tier
    assert counters(world)["spills"] == 8
    assert counters(world)["evictions"] == 0
    assert gauges(world)["leases"] == 0


def test_without_host_memory_vram_is_the_lowest_tier():
    world = World(engines=1, lenders=1, slabs=2)
    store(world, ONE, 0, 8)
    world.advance(1)
    assert len(spill(world)) == 7
    assert spill(world) == []  # of eight slots one may hold what is not in storage
    world.directory.check_integrity()


def test_what_is_in_storage_makes_room_until_it_is_evicted(world):
    fill(world)
    assert len(spill(world)) == 8
    store(world, ONE, 3, 4)  # evicts four that are in storage
    assert counters(world)["evictions"] == 4
    assert (hits(world, ONE, 0, 8), hits(world, ONE, 2, 8)) == (4, 8)
    world.advance(1)
    assert spill(world) == ONE.keys(3, 4)[::-1]  # they went to host memory


def test_a_plan_holds_all_shards_of_at_most_its_bytes_but_at_least_one_chunk(world):
    for shard in range(2):
        store(world, TWO, 0, 4, shard=shard, avoid=[1])
    plan = world.spill(world.clients[0], 0)
    assert [spill.shard for spill in plan.spills] == [0, 1]
    world.release(plan.lease)
    assert len(keys_of(world.spill(world.clients[0], 3 * 256))) == 1
    with pytest.raises(ProtocolError):
        world.directory.spill(world.clients[0].id, -1, [], world.now)


def test_a_chunk_between_two_tiers_is_not_in_the_lowest_one(world):
    store(world, TWO, 0, 4, shard=0, avoid=[1])
    store(world, TWO, 0, 4, shard=1)
    assert spill(world) == []


def test_leased_planned_and_foreign_chunks_are_not_planned(world):
    fill(world)
    lease = world.acquire(world.clients[1], ONE, 0, 0, 4)
    first = world.spill(world.clients[0], 2 * 256)
    second = world.spill(world.clients[1], ALL)
    assert (len(keys_of(first)), len(keys_of(second))) == (2, 2)
    assert world.spill(world.clients[0], ALL).lease == 0
    world.release(lease)
    assert world.directory.spill(world.clients[0].id, ALL, [2], world.now).lease == 0
    foreigner = world.new_client("g")
    world.connect(foreigner)
    assert world.directory.spill(foreigner.id, ALL, [], world.now) == SpillPlan()


def test_of_two_slot_sizes_the_colder_chunks_go_first(world):
    store(world, BIG, 0, 2, avoid=[1])
    world.advance(1)
    store(world, ONE, 0, 4, avoid=[1])
    world.advance(1)
    store(world, ONE, 2, 8)
    assert spill(world, 2 * 512) == BIG.keys(0, 2)[::-1]


# What becomes of it


def test_what_was_not_written_is_left_alone_for_a_while(world):
    fill(world)
    plan = world.spill(world.clients[0], 2 * 256)
    world.spilled(world.clients[0], plan.lease, keys_of(plan)[:1])
    assert gauges(world)["leases"] == 0
    left = keys_of(plan)[1]
    assert left not in spill(world, 2 * 256)
    world.advance(spilling.RETRY_SECONDS)
    assert left in spill(world, 3 * 256)


def test_the_mark_dies_with_the_chunk(world):
    fill(world)
    assert len(spill(world)) == 8
    keys = ONE.keys(0, 8)
    world.remove(world.clients[0], ONE, 0, 0)
    for lender in world.clients[2:]:
        world.wipe(lender)
    assert world.directory._state.allocator.hosts["h"].spilled == 0
    store(world, ONE, 0, 8, avoid=[1])
    world.advance(1)
    assert spill(world) == keys[::-1]


def test_marks_come_late_twice_or_for_nothing(world):
    fill(world)
    client = world.clients[0]
    plan = world.spill(client, 2 * 256)
    world.advance(9.0)  # the lease is over
    for _ in range(2):
        world.directory.spilled(client.id, plan.lease, [*keys_of(plan), b"?" * 16], world.now)
        world.directory.spilled(client.id, 0, [], world.now)
    assert counters(world)["spills"] == 2
    assert not set(keys_of(plan)) & set(spill(world))


def test_a_lease_that_is_no_plan_is_not_ended(world):
    fill(world)
    lease = world.acquire(world.clients[0], ONE, 0, 0, 2)
    world.directory.spilled(world.clients[0].id, lease, [], world.now)
    assert gauges(world)["leases"] == 1


def test_a_mark_moves_with_its_chunk(world):
    store(world, ONE, 0, 8)
    world.directory.spilled(world.clients[0].id, 0, ONE.keys(0, 8), world.now)
    plan = world.demote(world.clients[0], ALL)
    assert all(world.finish(world.clients[0], list(world.clients[0].flights)))
    world.release(plan.lease)
    world.directory.check_integrity()
    assert world.directory._state.allocator.hosts["h"].spilled == 2 * SLAB_BYTES
    world.shrink(world.clients[3], ALL)
    world.directory.check_integrity()


def test_what_is_in_storage_is_evicted_first_although_a_search_passed_while_it_was_leased(world):
    fill(world)
    plan = world.spill(world.clients[0], ALL)
    store(world, ONE, 3, 2)  # Room comes from chunks that are not in storage: these are leased.
    assert counters(world)["evictions"] == 2
    world.spilled(world.clients[0], plan.lease, keys_of(plan))
    world.directory.check_integrity()
    before = set(world.directory._state.chunks.visible)
    world.advance(1)
    store(world, ONE, 1, 4)  # shares two chunks with prompt 0
    assert before - set(world.directory._state.chunks.visible) < set(keys_of(plan))


def test_what_was_used_while_it_was_written_is_not_cooled(world):
    fill(world)
    plan = world.spill(world.clients[0], ALL)
    world.advance(1)
    assert hits(world, ONE, 0, 4) == 4
    world.spilled(world.clients[0], plan.lease, keys_of(plan))
    store(world, ONE, 3, 4)
    assert hits(world, ONE, 0, 8) == 4


@pytest.mark.parametrize("name", ["lru", "sieve"])
def test_the_search_is_bounded(name):
    policy = make_policy(name)
    records = [Record(b"%d" % number, None, 0) for number in range(10)]
    for record in records:
        policy.add(record, 256)
    queue = policy.queues[256]
    assert list(policy.next_victims(queue, 4)) in (records[:4], records[:3])
    assert list(policy.next_victims(queue, 100)) == records
    policy.touch(records[:2], 5)
    assert list(policy.next_victims(queue, 100)) == records[2:] + sorted(records[:2], key=records.index, reverse=name == "lru")


def test_integrity_notices_a_wrong_sum(world):
    fill(world)
    spill(world)
    record = next(record for record in world.directory._state.chunks.visible.values() if record.spilled)
    record.spilled = False
    with pytest.raises(IntegrityError, match="storage"):
        world.directory.check_integrity()
    record.spilled = True


# Who is asked for room


def test_an_engine_is_asked_once_until_it_has_nothing_more_to_do(world):
    engine = world.clients[0]
    store(world, ONE, 0, 4)
    assert engine.room == 0  # half of VRAM is not above the high watermark
    store(world, ONE, 0, 1, start=4)
    assert engine.room == 1
    store(world, ONE, 0, 2, start=5)
    store(world, ONE, 0, 1, start=7, writer=1)
    assert (engine.room, world.clients[1].room) == (1, 0)
    while plan := world.demote(engine, ALL).lease:
        world.finish(engine, list(engine.flights))
        world.release(plan)
    world.directory.spilled(engine.id, 0, ONE.keys(0, 8), world.now)  # the pool as a whole is not the matter here
    store(world, ONE, 2, 3)
    assert engine.room == 1  # four of eight slots
    store(world, ONE, 2, 1, start=3)
    assert engine.room == 2
    world.advance(ASK_AGAIN)
    store(world, ONE, 2, 1, start=4, writer=1)
    assert world.clients[1].room == 1


def test_the_whole_pool_counts_without_what_is_in_storage(world):
    engine = world.clients[0]
    store(world, ONE, 0, 8, avoid=[1])
    assert engine.room == 0
    store(world, ONE, 2, 1)
    assert engine.room == 1  # nine of sixteen slots; VRAM has room
    assert len(spill(world)) == 6
    assert spill(world) == []
    store(world, ONE, 2, 3, start=1)
    assert engine.room == 1
    store(world, ONE, 2, 2, start=4)
    assert engine.room == 2  # VRAM


def test_without_host_memory_nobody_is_asked_to_demote():
    config = ManagerConfig(**{**CONFIG, "high_watermark": 0.9})
    world = World(engines=1, lenders=2, slabs=1)
    world.directory._state.config = config
    store(world, ONE, 0, 4)
    assert world.clients[0].room == 1
    world = World(engines=1, lenders=1, slabs=1)
    world.directory._state.config = msgspec.structs.replace(config, high_watermark=1.0)
    store(world, ONE, 0, 4)
    assert world.clients[0].room == 0


def test_only_engines_that_say_their_host_are_asked(world):
    directory: Directory = world.directory
    for role, host, asked in (("tool", "h", 0), ("lender", "h", 0), ("engine", "", 0), ("engine", "g", 0), ("engine", "h", 1)):
        directory._state.allocator.hosts["h"].spilled_all()
        directory._state.allocator.hosts["h"].demoted()
        client = world.new_client(host)
        directory.open_session(client.id, "c", role, world.now, host=host)
        directory.take_instructions()
        client.connected, client.epoch, client.host = True, world.epoch, "h"
        before = list(client.flights)
        world.put(client, ONE, 2, 0, 8)
        assert client.room == asked, (role, host)
        for flight in [flight for flight in client.flights if flight not in before]:
            world.revoke(client, flight)
    assert not any(isinstance(push, RoomWanted) for _, push in directory.take_instructions())
