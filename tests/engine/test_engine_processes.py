"""Two engine processes and a lender: what one stores, the other retrieves, byte for byte."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.cluster import eventually
from support.paged import LAYOUTS, content, spec_for

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.processes


def case(seed: int) -> dict[str, Any]:
    """A random prompt with masks, slots and block sizes for a writer and a reader."""
    rng = random.Random(seed)
    count = rng.choice([1, 15, 16, 17, 40, 64, 75])
    return {
        "tokens": [rng.randrange(2**32) for _ in range(count)],
        "writer": (rng.sample(range(96), count), 12, 8),
        "reader": (rng.sample(range(128), count), 8, 16),
        "skipped": 16 * rng.randrange(count // 16 + 1),
        "offset": rng.randrange(16),
    }


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (layout, dtype)
        for layout, dtype in zip(LAYOUTS, ("bfloat16", "float8_e4m3fn", "float32", "float16", "int8"), strict=True)
    ],
)
def test_random_prompts_between_processes(cluster: Cluster, layout: str, dtype: str) -> None:
    spec = spec_for(layout, dtype)
    cluster.lend()
    writer, reader = cluster.engine(spec), cluster.engine(spec)
    for seed in range(6):
        one = case(seed)
        tokens, skipped = one["tokens"], one["skipped"]
        slots, blocks, block_size = one["writer"]
        writer.call("store", layout, tokens, slots, blocks, block_size, 0, 0)
        # Again, under mask and offset: nothing may change, since all chunks exist.
        offset = min(one["offset"], skipped)
        writer.call("store", layout, tokens, slots[offset:], blocks, block_size, skipped, offset)
        assert reader.call("lookup", tokens) == len(tokens)
        slots, blocks, block_size = one["reader"]
        mask, rows = reader.retrieve(layout, tokens, slots, blocks, block_size, skipped)
        assert mask == [i >= skipped for i in range(len(tokens))]
        assert np.array_equal(rows[slots[skipped:]], content(spec, tokens, start=skipped))
        assert not np.delete(rows, slots[skipped:], axis=0).any(), "rows of other tokens are untouched"
    assert reader.call("stats")["counters"]["stale_reads"] == 0


def test_engine_death_keeps_chunks_in_memory_lent_by_another_process(cluster: Cluster) -> None:
    spec = spec_for("2BNHD")
    cluster.lend()
    writer = cluster.engine(spec)
    tokens = list(range(64))
    writer.call("store", "2BNHD", tokens, tokens, 12, 8, 0, 0)
    writer.kill()
    reader = cluster.engine(spec)
    mask, rows = reader.retrieve("2BNHD", tokens, tokens, 12, 8, 0)
    assert all(mask)
    assert np.array_equal(rows[tokens], content(spec, tokens))


def test_an_engine_lends_in_process_and_its_death_is_a_miss(cluster: Cluster) -> None:
    spec = spec_for("2BNHD")
    writer = cluster.engine(spec, segment={"lend": True, "size": "2MiB", "slab_size": "512KiB"})
    reader = cluster.engine(spec)
    tokens = list(range(64))
    writer.call("store", "2BNHD", tokens, tokens, 12, 8, 0, 0)
    mask, rows = reader.retrieve("2BNHD", tokens, tokens, 12, 8, 0)
    assert all(mask)
    assert np.array_equal(rows[tokens], content(spec, tokens))
    writer.kill()
    eventually(lambda: reader.call("lookup", tokens) == 0, what="chunks of a dead lender become misses")
    mask, rows = reader.retrieve("2BNHD", tokens, tokens, 12, 8, 0)
    assert not any(mask)


def test_keys_are_equal_in_every_process(cluster: Cluster) -> None:
    spec = spec_for("BHNC", "bfloat16")
    a, b = cluster.engine(spec), cluster.engine(spec)
    assert a.call("keys", list(range(100))) == b.call("keys", list(range(100)))


def test_sharded_chunks_hit_only_when_every_shard_is_complete(cluster: Cluster) -> None:
    cluster.lend()
    ranks = [cluster.engine(spec_for("2BNHD", world_size=2, rank=rank)) for rank in range(2)]
    tokens = list(range(40))
    ranks[0].call("store", "2BNHD", tokens, tokens, 12, 8, 0, 0)
    assert [rank.call("lookup", tokens) for rank in ranks] == [0, 0]
    ranks[1].call("store", "2BNHD", tokens[:32], tokens[:32], 12, 8, 0, 0)
    assert [rank.call("lookup", tokens) for rank in ranks] == [32, 32]
    for rank in ranks:
        mask, _ = rank.retrieve("2BNHD", tokens, tokens, 12, 8, 0)
        assert mask == [i < 32 for i in range(40)]
