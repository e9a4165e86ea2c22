"""Complete shards of chunks of which other shards are not: how long they stay, and what they may cost others."""

from __future__ import annotations

import pytest
from directory_cases import ME, header, lone, slab_of

from vcache.manager.api import PutRequest, Ticket
from vcache.manager.directory.directory import Directory
from vcache.segment.slots import slab_bytes_for, slab_geometry

RANK = b"r" * 16


def full(slots: int) -> Directory:
    """A directory with a pool of about that many slots, full of visible chunks."""
    directory, info = lone(nbytes=slab_bytes_for(256, slots))
    directory.open_session(RANK, "rank", "engine", 0.0)
    slots = slab_geometry(info.slabs[0].nbytes, 256).slots
    directory.mount(
        ME, info, [slab_of(*[header(key=number.to_bytes(16), generation=20) for number in range(slots)], slots=slots)], 0.0
    )
    assert directory.stats(0.0).gauges["slots_free"] == 0
    return directory


def put_half(directory: Directory, first: int, count: int, shard: int = 0, now: float = 0.0) -> list[str]:
    """One of two shards of chunks, written to the end. The grants' answers."""
    names = [(10**6 + number).to_bytes(16) for number in range(first, first + count)]
    request = PutRequest(
        keys=names,
        namespace=b"n" * 16,
        parent=b"",
        first_index=0,
        tokens=[4] * count,
        slot_bytes=256,
        shard=shard,
        num_shards=2,
    )
    grants = directory.put_start(RANK if shard == 0 else ME, request, now)
    tickets = [
        Ticket(name, shard, grant.location.generation) for name, grant in zip(names, grants, strict=True) if grant.location
    ]
    assert all(directory.put_end(RANK if shard == 0 else ME, tickets, now))
    directory.check_integrity()
    return [grant.status for grant in grants]


def visible(directory: Directory) -> int:
    return directory.stats(0.0).gauges["chunks"]


def test_a_rank_without_siblings_does_not_push_out_what_others_can_read():
    """Shards whose siblings never came pushed out everything that was complete, and could themselves not go for 30 s."""
    directory = full(64)
    total = visible(directory)
    for batch in range(10):
        statuses = put_half(directory, 20 * batch, 20)
        assert "granted" in statuses
    assert visible(directory) >= 0.6 * total
    assert put_half(directory, 2000, 20) == ["granted"] * 20, "its own old shards make room for its new ones"
    # What it wrote last is still there for its sibling, beyond whose chunks nothing was lost.
    assert put_half(directory, 2000, 4, shard=1) == ["granted"] * 4
    assert visible(directory) >= 0.6 * total


def test_shards_that_wait_for_long_go_before_chunks_that_can_be_read():
    directory = full(64)
    total = visible(directory)
    assert put_half(directory, 0, 8) == ["granted"] * 8
    assert visible(directory) == total - 8
    for client in (ME, RANK):
        directory.heartbeat(client, 3.0)
    names = [bytes([200 + number]) * 16 for number in range(8)]
    request = PutRequest(keys=names, namespace=b"n" * 16, parent=b"", first_index=0, tokens=[4] * 8, slot_bytes=256)
    assert {grant.status for grant in directory.put_start(ME, request, 3.0)} == {"granted"}
    assert visible(directory) == total - 8
    assert directory.stats(3.0).counters["incomplete"] == 8
    directory.check_integrity()


def test_two_ranks_that_store_together_lose_nothing_to_each_other():
    directory = full(64)
    for shard in (0, 1):
        assert put_half(directory, 0, 12, shard=shard) == ["granted"] * 12
    assert directory.lookup(ME, [(10**6 + number).to_bytes(16) for number in range(12)], 0.0) == 12


@pytest.mark.parametrize("shard", [0, 1])
def test_a_shard_that_was_found_gives_way_to_a_put_that_contradicts_it(shard):
    """A header whose number of shards was damaged came back as a part of a chunk that could never be complete, and kept the
    real one from being stored for as long as a ticket lives."""
    directory, info = lone()
    directory.mount(ME, info, [slab_of(header(num_shards=7, shard=shard))], 0.0)
    assert directory.stats(0.0).gauges["chunks_pending"] == 1
    request = PutRequest(keys=[b"k" * 16], namespace=b"n" * 16, parent=b"", first_index=0, tokens=[4], slot_bytes=256)
    (grant,) = directory.put_start(ME, request, 0.0)
    assert grant.status == "granted"
    directory.check_integrity()
    assert directory.put_end(ME, [Ticket(b"k" * 16, 0, grant.location.generation)], 0.0) == [True]
    assert directory.lookup(ME, [b"k" * 16], 0.0) == 1
    directory.check_integrity()


def test_a_shard_that_somebody_wrote_does_not_give_way():
    directory, info = lone()
    directory.open_session(RANK, "rank", "engine", 0.0)
    directory.mount(ME, info, [], 0.0)
    assert put_half(directory, 0, 1) == ["granted"]
    request = PutRequest(
        keys=[(10**6).to_bytes(16)],
        namespace=b"n" * 16,
        parent=b"",
        first_index=0,
        tokens=[4],
        slot_bytes=256,
        shard=1,
        num_shards=3,
    )
    assert [grant.status for grant in directory.put_start(ME, request, 0.0)] == ["busy"]
