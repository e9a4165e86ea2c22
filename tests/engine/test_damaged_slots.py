"""Memory that changes by itself: with checksums a miss, and its segment is used no more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.paged import Paged, content, spec_for

from vcache import VCacheConfig, VCacheEngine
from vcache.cache.pool import ChunkPool
from vcache.keys import Chunk
from vcache.lender.lender import Lender
from vcache.metrics import EngineMetrics
from vcache.paged.layout import PagedCache
from vcache.paged.mover import Rows, Target
from vcache.paged.select import mover_for
from vcache.segment.host import HostBacking

LAYOUT, CHUNK, COUNT = "2BNHD", 16, 4
SPEC = spec_for(LAYOUT)
TOKENS = list(range(COUNT * CHUNK))
ALL = [True] * COUNT


class World:
    def __init__(self, checksum: str, **storage: Any) -> None:
        self.config = VCacheConfig.from_env(
            {},
            segment={"kind": "host", "size": "1MiB", "slab_size": "256KiB"},
            cache={"chunk_size": CHUNK, "checksum": checksum, "placement": "spread"},
            storage=storage,
        )
        self.engine = VCacheEngine(self.config, SPEC, device="cpu")
        self.lenders: list[Lender] = []

    @property
    def pool(self) -> ChunkPool:
        return self.engine.pool

    def another_pool(self, checksum: Any) -> ChunkPool:
        return ChunkPool(self.pool.manager, self.pool.segments, SPEC, CHUNK, EngineMetrics(), checksum=checksum)

    def lend_more(self) -> None:
        lender = Lender(self.pool.manager, HostBacking(), self.config.segment)
        assert lender.wait_mounted(5)
        self.pool.segments.add_local(lender.uuid, lender.slab, lender.backing)
        for info in self.pool.manager.segments():
            self.pool.segments.update(info)
        self.lenders.append(lender)

    def chunks(self) -> list[Chunk]:
        return [Chunk(key.digest, i, CHUNK, i * CHUNK) for i, key in enumerate(self.engine.chunk_keys(TOKENS))]

    def store(self, pool: ChunkPool) -> int:
        """Number of chunks written now."""
        paged = Paged.zeros(SPEC, LAYOUT, 8, 8)
        paged.write(TOKENS, content(SPEC, TOKENS))
        return len(pool.put(self.chunks(), b"", self.rows(paged)).result().stored)

    def rows(self, paged: Paged) -> Rows:
        cache = PagedCache.bind(paged.tensors, SPEC)
        return Rows(Target(cache, mover_for(cache, self.config.transfer)), torch.tensor(TOKENS))

    def load(self, pool: ChunkPool) -> list[bool]:
        """Which chunks arrive; those that do are right."""
        paged = Paged.zeros(SPEC, LAYOUT, 8, 8)
        lease = pool.acquire([chunk.digest for chunk in self.chunks()])
        flags = pool.load(lease, self.chunks(), self.rows(paged)).result()
        expected, got = content(SPEC, TOKENS), paged.read(TOKENS)
        for index, ok in enumerate(flags):
            rows = slice(index * CHUNK, (index + 1) * CHUNK)
            assert not ok or np.array_equal(got[rows], expected[rows]), f"chunk {index} has wrong bytes"
        return flags

    def damage(self, index: int) -> int:
        """Flip a bit of a chunk in its slot; the segment's number."""
        lease = self.pool.acquire([chunk.digest for chunk in self.chunks()])
        slot = self.pool.segments.pin(lease.locations[index])
        assert slot is not None
        assert slot.slab.buffer is not None
        slot.slab.buffer[slot.payload_offset + 77] ^= 0x04
        self.pool.segments.unpin(slot)
        self.pool.release(lease.id)
        return lease.locations[index].segment

    def close(self) -> None:
        for lender in self.lenders:
            lender.close()
        self.engine.close()


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def build(checksum: str, **storage: Any) -> World:
        made.append(World(checksum, **storage))
        return made[-1]

    yield build
    for world in made:
        world.close()


def count(pool: ChunkPool, name: str) -> int:
    return int(pool.metrics.snapshot()["counters"][name])


def test_a_damaged_chunk_is_a_miss_and_its_segment_is_used_no_more(
    make: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    """A bit that flipped in the pool's memory was delivered as KV: headers do not notice it."""
    world = make("always")
    pool = world.pool
    assert world.store(pool) == COUNT
    assert world.load(pool) == ALL
    number = world.damage(2)
    with caplog.at_level(logging.ERROR, "vcache"):
        assert world.load(pool) == [True, True, False, True]
        assert world.load(pool) == [False] * COUNT
    assert (count(pool, "checksum_failures"), count(pool, "stale_reads")) == (1, 0)
    assert [record.levelname for record in caplog.records if "checksum" in record.message] == ["ERROR"]
    assert pool.segments.unreachable() == [number]
    assert "checksum" in world.engine.get_stats()["segments"][0]["problem"]
    assert world.store(pool) == 0, "there is no other segment"
    world.lend_more()
    assert world.store(pool) == 1, "the damaged one, elsewhere"
    assert pool.segments.unreachable() == [number], "also when it is announced again"
    assert pool.no_writes()
    pool.manager.remove([chunk.digest for chunk in world.chunks()])
    assert world.store(pool) == COUNT
    assert world.load(pool) == ALL


def test_engines_with_and_without_checksums_share_chunks(make: Callable[..., World]) -> None:
    for one, two in (("off", "always"), ("always", "off"), ("sample", "always")):
        world = make(one)
        other = world.another_pool(two)
        assert world.store(world.pool) == COUNT
        assert world.store(other) == 0
        assert world.load(other) == ALL
        assert world.load(world.pool) == ALL
        world.pool.manager.remove([chunk.digest for chunk in world.chunks()])
        assert world.store(other) == COUNT
        assert world.load(world.pool) == ALL
        assert count(other, "checksum_failures") == count(world.pool, "checksum_failures") == 0


def test_a_sample_finds_damage_sooner_or_later(make: Callable[..., World]) -> None:
    world = make("sample")
    assert world.store(world.pool) == COUNT
    lease = world.pool.acquire([chunk.digest for chunk in world.chunks()])
    assert lease.locations[0].slot_bytes == SPEC.payload_bytes(CHUNK) + 256
    loads = 0
    slot = world.pool.segments.pin(lease.locations[1])
    assert slot is not None
    assert slot.slab.buffer is not None
    trailer = slot.payload_offset + SPEC.payload_bytes(CHUNK) + 240
    slot.slab.buffer[trailer] ^= 1  # not the payload, so that `load` finds right bytes
    world.pool.segments.unpin(slot)
    while not count(world.pool, "checksum_failures"):
        assert world.load(world.pool)[1] == (not count(world.pool, "checksum_failures"))
        loads += 1
        assert loads < 2000
    assert world.load(world.pool) == [False] * COUNT


def test_damaged_chunks_are_not_written_to_storage(make: Callable[..., World]) -> None:
    """There they would get a checksum that is right for the wrong bytes."""
    world = make("always", kind="memory", write="never")
    assert world.store(world.pool) == COUNT
    out = memoryview(bytearray(world.pool.slot_bytes + 64))
    lease = world.pool.acquire([chunk.digest for chunk in world.chunks()])
    assert world.pool.read(lease.locations[2], world.chunks()[2], out) == 64 + SPEC.payload_bytes(CHUNK)
    world.damage(2)
    assert world.pool.read(lease.locations[2], world.chunks()[2], out) == 0
    assert count(world.pool, "checksum_failures") == 1


def test_an_engine_that_does_not_ask_for_checksums_has_none(make: Callable[..., World]) -> None:
    world = make("off")
    assert world.store(world.pool) == COUNT
    lease = world.pool.acquire([chunk.digest for chunk in world.chunks()])
    assert {location.slot_bytes for location in lease.locations} == {SPEC.payload_bytes(CHUNK)}
