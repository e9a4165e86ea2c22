"""A slot that was overwritten in place: a miss for its readers, and the chunk can be stored again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from support.paged import Paged, content, spec_for

from vcache import VCacheConfig, VCacheEngine
from vcache.errors import ManagerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYOUT, CHUNK = "2BNHD", 16
TOKENS = list(range(3 * CHUNK))


@pytest.fixture
def engine() -> Iterator[VCacheEngine]:
    segment = {"kind": "host", "size": "1MiB", "slab_size": "256KiB"}
    config = VCacheConfig.from_env({}, segment=segment, cache={"chunk_size": CHUNK})
    with VCacheEngine(config, spec_for(LAYOUT), device="cpu") as engine:
        yield engine


def store(engine: VCacheEngine) -> None:
    paged = Paged.zeros(spec_for(LAYOUT), LAYOUT, 8, 8)
    paged.write(TOKENS, content(spec_for(LAYOUT), TOKENS))
    engine.store(TOKENS, kvcaches=paged.tensors, slot_mapping=torch.tensor(TOKENS))


def retrieve(engine: VCacheEngine) -> int:
    """Number of tokens found; all of them are checked."""
    paged = Paged.zeros(spec_for(LAYOUT), LAYOUT, 8, 8)
    found = int(engine.retrieve(TOKENS, kvcaches=paged.tensors, slot_mapping=torch.tensor(TOKENS)).sum())
    assert not found or np.array_equal(paged.read(TOKENS[:found]), content(spec_for(LAYOUT), TOKENS[:found]))
    return found


def digests(engine: VCacheEngine) -> list[bytes]:
    return [key.digest for key in engine.chunk_keys(TOKENS)]


def overwrite(engine: VCacheEngine, position: int) -> None:
    """Destroy the header of one chunk of the prompt, in place."""
    lease = engine.pool.acquire(digests(engine)[position:])
    slot = engine.pool.segments.pin(lease.locations[0])
    assert slot is not None
    assert slot.slab.buffer is not None
    slot.slab.buffer[slot.header_offset + 20] ^= 0xFF
    engine.pool.segments.unpin(slot)
    engine.pool.release(lease.id)


def counter(engine: VCacheEngine, name: str) -> int:
    return engine.get_stats()["counters"][name]


def test_a_broken_chunk_is_a_miss_and_can_be_stored_again(engine: VCacheEngine) -> None:
    store(engine)
    overwrite(engine, 1)
    assert retrieve(engine) == CHUNK
    assert retrieve(engine) == CHUNK
    assert counter(engine, "stale_reads") == 2
    stored = counter(engine, "store_chunks")
    store(engine)
    assert counter(engine, "store_chunks") == stored + 1, "the others exist, and stay"
    assert retrieve(engine) == len(TOKENS)
    assert engine.pool.broken(digests(engine)) == []


def test_a_chunk_that_somebody_reads_is_not_taken_away(engine: VCacheEngine) -> None:
    store(engine)
    overwrite(engine, 1)
    assert retrieve(engine) == CHUNK
    lease = engine.pool.acquire(digests(engine))
    store(engine)
    assert engine.pool.lookup(digests(engine)).found == 3
    engine.pool.release(lease.id)
    assert retrieve(engine) == CHUNK, "it fails again, and is marked again"
    store(engine)
    assert retrieve(engine) == len(TOKENS)


def test_a_copy_that_another_engine_stored_meanwhile_is_kept(engine: VCacheEngine) -> None:
    store(engine)
    overwrite(engine, 1)
    assert retrieve(engine) == CHUNK
    engine.pool.manager.remove(digests(engine)[1:2])
    store(engine)  # without a mark this time
    assert retrieve(engine) == len(TOKENS)
    engine.pool.mark_broken(digests(engine))
    assert retrieve(engine) == len(TOKENS)
    assert engine.pool.broken(digests(engine)) == [], "what was read and verified is not broken"


def test_no_manager_no_harm(engine: VCacheEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    store(engine)
    overwrite(engine, 0)
    assert retrieve(engine) == 0

    def fail(keys: object) -> int:
        raise ManagerUnavailableError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine.pool.manager, "remove", fail)
        store(engine)
    assert counter(engine, "manager_errors") == 1
    assert retrieve(engine) == 0


def test_marks_are_bounded(engine: VCacheEngine) -> None:
    from vcache.cache.pool import MAX_BROKEN

    names = [index.to_bytes(16, "big") for index in range(MAX_BROKEN + 10)]
    engine.pool.mark_broken(names)
    assert engine.pool.broken(names) == names[10:]


@pytest.mark.parametrize("bit", [0, 40])
def test_a_slab_header_of_a_later_format_is_mended(engine: VCacheEngine, bit: int) -> None:
    """One flipped bit in the generation of a slab's format kept every writer away for good, while the manager went on to give
    out its slots first: nothing was stored any more."""
    store(engine)
    lender = engine.cache.lender
    assert lender is not None
    for info in engine.manager.segments()[0].slabs:
        slab = lender.slab(info.index)
        assert slab is not None
        assert slab.buffer is not None
        if any(slab.buffer[:64]):
            whole = int.from_bytes(slab.buffer[8:16], "little")
            slab.buffer[8:16] = (whole + (1 << bit)).to_bytes(8, "little")
    paged = Paged.zeros(spec_for(LAYOUT), LAYOUT, 8, 8)
    other = [token + 1000 for token in TOKENS]
    for _ in range(2):
        engine.store(other, kvcaches=paged.tensors, slot_mapping=torch.tensor(TOKENS))
    assert engine.lookup(other) == len(other)
    assert counter(engine, "slab_headers_mended") >= 1
    assert retrieve(engine) == len(TOKENS), "what was there before is still right"
