"""Slabs in which somebody may be amid a write of an earlier manager's ticket: no slot of theirs is given out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from directory_cases import BIG, ME, ONE, header, hits, lone, slab_of, store
from directory_world import World

from vcache.manager.api import GateReport, GateWriter, PutGrant, PutRequest, Ticket, UndoneSlots
from vcache.manager.directory.directory import Directory
from vcache.segment.slots import SegmentInfo

WRITER, OTHER = b"w" * 16, b"o" * 16
FENCE = 77


def put(directory: Directory, first: int, count: int = 1) -> list[PutGrant]:
    keys = [b"key%013d" % number for number in range(first, first + count)]
    request = PutRequest(keys=keys, namespace=b"n" * 16, parent=b"", first_index=0, tokens=[4] * count, slot_bytes=256)
    return directory.put_start(OTHER, request, 1.0)


def statuses(grants: list[PutGrant]) -> list[str]:
    return [grant.status for grant in grants]


@pytest.fixture
def mounted() -> tuple[Directory, SegmentInfo]:
    """One slab with four slots, one of them with a chunk, in which WRITER is counted."""
    directory, info = lone()
    directory.open_session(OTHER, "o", "engine", 0.0)
    inventory = [slab_of(header(), slots=4)]
    directory.mount(ME, info, inventory, 1.0, GateReport(fence=FENCE, writers=(GateWriter(WRITER, 0),)))
    directory.take_instructions()
    return directory, info


def test_nothing_is_granted_or_evicted_while_it_waits(mounted: tuple[Directory, SegmentInfo]) -> None:
    directory, _ = mounted
    assert statuses(put(directory, 0, 6)) == ["no_space"] * 6
    assert directory.lookup(OTHER, [b"k" * 16], 1.0) == 1, "what is there can be read, and nothing goes for slots of no use"
    assert directory.stats(1.0).counters["evictions"] == 0
    directory.check_integrity()


def report(directory: Directory, info: SegmentInfo) -> None:
    directory.writers_left(ME, info.uuid, [GateWriter(WRITER, 0), GateWriter(OTHER, 9)], 2.0)


def remount(directory: Directory, info: SegmentInfo) -> None:
    directory.mount(ME, info, [slab_of(header(), slots=4)], 2.0, GateReport(fence=FENCE))


@pytest.mark.parametrize("end", [report, remount])
def test_it_is_open_again_when_the_writer_is_known_to_be_done(
    mounted: tuple[Directory, SegmentInfo], end: Callable[[Directory, SegmentInfo], None]
) -> None:
    directory, info = mounted
    end(directory, info)
    grants = put(directory, 0, 3)
    assert statuses(grants) == ["granted"] * 3
    assert [grant.fence for grant in grants] == [FENCE] * 3, "each ticket carries the word of its mount"
    directory.check_integrity()


def test_no_clock_and_no_client_opens_it(mounted: tuple[Directory, SegmentInfo]) -> None:
    directory, info = mounted
    directory.open_session(WRITER, "w", "engine", 2.0)
    assert statuses(put(directory, 0)) == ["no_space"], "it has nothing in flight, but what it left is still there"
    directory.close_session(WRITER, 2.0, goodbye=True)
    directory.writers_left(ME, info.uuid, [GateWriter(OTHER, 0)], 2.0)
    for now in (10.0, 1e6, 1e9):
        for client in (ME, OTHER):
            directory.open_session(client, "again", "lender" if client == ME else "engine", now)
        directory.mount(ME, info, [slab_of(header(), slots=4)], now, GateReport(fence=FENCE, writers=(GateWriter(WRITER, 0),)))
        directory.tick(now)
        assert statuses(put(directory, 0)) == ["no_space"]


def test_a_client_with_a_session_is_waited_for_as_well() -> None:
    """The lender undoes whatever is written in the slab before it reports: nobody else may write there meanwhile."""
    directory, info = lone()
    directory.open_session(OTHER, "o", "engine", 0.0)
    directory.mount(ME, info, [slab_of(slots=4)], 1.0, GateReport(fence=FENCE, writers=(GateWriter(OTHER, 0),)))
    assert statuses(put(directory, 0)) == ["no_space"]
    directory.writers_left(ME, info.uuid, [GateWriter(OTHER, 0)], 1.0)
    assert statuses(put(directory, 0)) == ["granted"]


def test_chunks_that_an_old_write_went_over_are_absent(mounted: tuple[Directory, SegmentInfo]) -> None:
    """Evicted by the manager before, found by this one because its header stood, and then overwritten: it was present for
    ever, could not be read, and nobody was granted to write it anew."""
    directory, info = mounted
    directory.writers_left(ME, info.uuid, [GateWriter(WRITER, 0)], 2.0, [UndoneSlots(0, 0, 2**32 - 1), UndoneSlots(7, 0, 1)])
    assert directory.lookup(OTHER, [b"k" * 16], 2.0) == 0
    directory.check_integrity()
    assert statuses(put(directory, 0, 4)) == ["granted"] * 4
    tickets = [Ticket(write.key, 0, write.generation) for write in directory._state.writes.of(OTHER)]
    assert all(directory.put_end(OTHER, tickets, 2.0))
    directory.writers_left(ME, info.uuid, [GateWriter(WRITER, 0)], 3.0, [UndoneSlots(0, 0, 4)])
    assert directory.lookup(OTHER, [b"key%013d" % n for n in range(4)], 3.0) == 4, (
        "a repetition says nothing of what came after"
    )
    directory.check_integrity()


def test_of_a_partial_chunk_an_overwritten_shard_is_absent() -> None:
    directory, info = lone()
    directory.open_session(OTHER, "o", "engine", 0.0)
    half = slab_of(header(num_shards=2, shard=1), slots=4)
    directory.mount(ME, info, [half], 1.0, GateReport(fence=FENCE, writers=(GateWriter(WRITER, 0),)))
    assert directory.stats(1.0).gauges["slots_used"] == 1
    directory.writers_left(ME, info.uuid, [GateWriter(WRITER, 0)], 2.0, [UndoneSlots(0, 0, 1)])
    assert directory.stats(2.0).gauges["slots_used"] == directory.stats(2.0).gauges["chunks_pending"] == 0
    directory.check_integrity()


def test_a_format_that_nobody_knows_of_does_not_outlive_its_writer() -> None:
    """A slab was about to be formatted for larger slots when the manager ended: the next one knew it as it was before, with the
    chunks whose headers stood. The old writer formatted it, wrote over their payloads, and left; whoever wrote next under the
    new manager's tickets took the later format for a damaged header and mended it: the old headers counted again, over the
    wrong bytes."""
    world = World(engines=2, lenders=1, slabs=1)
    old, other = world.clients[:2]
    store(world, ONE, 0, 4)
    assert statuses(world.put(old, BIG, 0, 0, 2)) == ["granted"] * 2
    flight = old.flights[1]
    world.enter(flight)
    world.restart_manager()
    for client in world.living:
        if client is not old:
            world.connect(client)
    assert hits(world, ONE, 0, 4) == 4, "evicted, but nobody knows"
    while world.write(flight):
        pass
    world.look_at_gates()
    assert statuses(world.put(other, ONE, 2, 0, 1)) == ["granted"]
    assert world.finish(other, other.flights) == [True]
    world.verify_all()
    assert (hits(world, ONE, 0, 1), hits(world, ONE, 2, 1)) == (0, 1)
    world.restart_manager()
    for client in world.living:
        world.connect(client)
    world.verify_all()
    assert (hits(world, ONE, 0, 1), hits(world, ONE, 2, 1), hits(world, BIG, 0, 2)) == (0, 1, 0)


def test_two_writers_are_both_waited_for() -> None:
    directory, info = lone()
    directory.open_session(OTHER, "o", "engine", 0.0)
    writers = (GateWriter(WRITER, 0), GateWriter(b"v" * 16, 0))
    directory.mount(ME, info, [slab_of(slots=4)], 1.0, GateReport(fence=FENCE, writers=writers))
    directory.writers_left(ME, info.uuid, writers[:1], 1.0)
    assert statuses(put(directory, 0)) == ["no_space"]
    directory.writers_left(ME, info.uuid, writers[1:], 1.0)
    assert statuses(put(directory, 0)) == ["granted"]


def test_other_slabs_go_on() -> None:
    directory, info = lone(slabs=2)
    directory.open_session(OTHER, "o", "engine", 0.0)
    directory.mount(ME, info, [], 1.0, GateReport(fence=FENCE, writers=(GateWriter(WRITER, 0),)))
    grants = put(directory, 0, 8)
    granted = [grant for grant in grants if grant.location is not None]
    assert granted
    assert {grant.location.slab for grant in granted if grant.location} == {1}


def test_generations_start_above_every_epoch_that_a_lender_knows() -> None:
    """The epoch is the time of day: set back between two managers, new tickets lay below old ones."""
    directory, info = lone()
    directory.open_session(OTHER, "o", "engine", 0.0)
    directory.mount(ME, info, [], 1.0, GateReport(fence=FENCE, floor=5_000_001))
    location = put(directory, 0)[0].location
    assert location is not None
    assert location.generation > 5_000_001
    assert directory.put_end(OTHER, [Ticket(b"key%013d" % 0, 0, location.generation)], 1.0) == [True]
