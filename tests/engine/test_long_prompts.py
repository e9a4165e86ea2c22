"""Prompts of many chunks: named in parts, and loaded in parts of which the first is on its way while the rest is prepared."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.paged import Paged, content, spec_for

from vcache import VCacheConfig, VCacheEngine
from vcache.cache.pool import HEAD_CHUNKS
from vcache.keys import TokenDatabase
from vcache.prompt import Prompt

CHUNK, CHUNKS = 4, 3 * HEAD_CHUNKS
TOKENS = CHUNK * CHUNKS - 1  # the last chunk is partial


def engine_on(**sections: Any) -> VCacheEngine:
    base: dict[str, Any] = {"segment": {"kind": "host", "size": "8MiB", "slab_size": "1MiB"}, "cache": {"chunk_size": CHUNK}}
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return VCacheEngine(VCacheConfig.from_env({}, **base), spec_for("2BNHD"))


def stored(engine: VCacheEngine) -> list[int]:
    tokens = list(range(7, 7 + TOKENS))
    source = Paged.zeros(engine.spec, "2BNHD", CHUNKS, CHUNK)
    source.write(list(range(TOKENS)), content(engine.spec, tokens))
    engine.store(tokens, kvcaches=source.tensors, slot_mapping=torch.arange(TOKENS))
    assert engine.flush(10)
    return tokens


def load(engine: VCacheEngine, tokens: list[int], skip: int = 0, *, named: bool = False) -> int:
    """Retrieve all but `skip` chunks; number of tokens behind them that are there, all of them checked. `named`: the engine
    still knows what the chunks are called; otherwise it names them while it loads."""
    if not named:
        engine._recent.clear()
    target = Paged.zeros(engine.spec, "2BNHD", CHUNKS, CHUNK)
    slots = torch.arange(TOKENS).flip(0)
    mask = None if not skip else torch.arange(TOKENS) >= skip * CHUNK
    there = engine.retrieve(tokens, mask, kvcaches=target.tensors, slot_mapping=slots)
    count = int(there.sum())
    begin = skip * CHUNK
    assert there[begin : begin + count].all(), "one run, from the first token asked for"
    good = slots[begin : begin + count].tolist()
    assert not count or np.array_equal(target.read(good), content(engine.spec, tokens)[begin : begin + count])
    return count


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("skip", [0, 1, HEAD_CHUNKS - 1, HEAD_CHUNKS, HEAD_CHUNKS + 1, CHUNKS - 1])
def test_all_of_a_long_prompt_comes_back(skip: int, named: bool) -> None:
    with engine_on() as engine:
        tokens = stored(engine)
        assert load(engine, tokens, skip, named=named) == TOKENS - skip * CHUNK
        assert engine.get_stats()["counters"]["misses"] == 0


@pytest.mark.parametrize("hole", [0, 5, HEAD_CHUNKS - 1, HEAD_CHUNKS, HEAD_CHUNKS + 1, CHUNKS - 1])
@pytest.mark.parametrize("storage", ["none", "memory"])
def test_a_hole_ends_the_prefix_unless_storage_fills_it(hole: int, storage: str) -> None:
    with engine_on(storage={"kind": storage}) as engine:
        tokens = stored(engine)
        key = engine.chunk_keys(tokens)[hole]
        assert engine.manager.remove([key.digest]) == 1
        assert load(engine, tokens) == (hole * CHUNK if storage == "none" else TOKENS)
        counters = engine.get_stats()["counters"]
        assert counters["lookups"] == counters["hits"] + counters["misses"] + counters["errors"] == CHUNKS
        assert counters["misses"] == (CHUNKS - hole if storage == "none" else 0)


def test_no_slot_stays_pinned_and_no_lease_behind() -> None:
    with engine_on() as engine:
        tokens = stored(engine)
        for hole in (None, HEAD_CHUNKS + 2):
            if hole is not None:
                engine.manager.remove([engine.chunk_keys(tokens)[hole].digest])
            load(engine, tokens)
            assert engine.manager.stats().gauges["leases"] == 0
        engine.cache.check_integrity()


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 8), st.booleans(), st.lists(st.integers(0, 12), max_size=4))
def test_naming_in_parts_is_naming_at_once(length: int, size: int, skipped: int, partial: bool, cuts: list[int]) -> None:
    database = TokenDatabase(bytes(16), size, partial=partial)
    ids = array("I", range(100, 100 + length))
    skipped = min(skipped * size, length)
    spans = database.spans(ids)
    assert len(spans) == database.count(length)
    first = min(-(-skipped // size), len(spans))
    prompt = Prompt(database, ids, skipped)
    assert prompt.length == len(spans) - first
    for end in sorted(min(cut, prompt.length) for cut in cuts):
        prompt.chunks(0, end)
        assert prompt.parent(end) == (spans[first + end - 1].digest if first + end else b"")
    chunks = prompt.chunks(0, prompt.length)
    assert [chunk.digest for chunk in chunks] == [span.digest for span in spans[first:]]
    assert [(chunk.position, chunk.start, chunk.tokens) for chunk in chunks] == [
        (index, span.start, span.end - span.start) for index, span in enumerate(spans[first:], start=first)
    ]
    assert list(range(length))[prompt.tokens(0, prompt.length)] == [
        token for span in spans[first:] for token in range(span.start, span.end)
    ]
