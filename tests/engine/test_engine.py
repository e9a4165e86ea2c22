"""The five calls in one process, with an embedded manager: contract, misuse, storage tier, threads."""

from __future__ import annotations

import random
import threading
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.paged import DTYPES, LAYOUTS, Paged, content, spec_for

from vcache import KVCacheSpec, VCacheConfig, VCacheEngine
from vcache.errors import ArgumentError, LayoutError, SpecError, VCacheError

CHUNK = 16


def config(**sections: Any) -> VCacheConfig:
    base: dict[str, Any] = {"segment": {"kind": "host", "size": "4MiB", "slab_size": "512KiB"}, "cache": {"chunk_size": CHUNK}}
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return VCacheConfig.from_env({}, **base)


def filled(spec: KVCacheSpec, layout: str, tokens: list[int], slots: list[int], blocks: int = 12, block_size: int = 8) -> Paged:
    paged = Paged.zeros(spec, layout, blocks, block_size)
    paged.write(slots, content(spec, tokens))
    return paged


def random_slots(count: int, seed: int, blocks: int = 12, block_size: int = 8) -> list[int]:
    return random.Random(seed).sample(range(blocks * block_size), count)


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 7919 + i).randrange(50_000) for i in range(count)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_byte_equal(layout: str, dtype: str) -> None:
    spec = spec_for(layout, dtype)
    tokens, source, target = tokens_of(40), random_slots(40, 1), random_slots(40, 2)
    with VCacheEngine(config(), spec) as engine:
        a = filled(spec, layout, tokens, source)
        engine.store(tokens, kvcaches=a.tensors, slot_mapping=torch.tensor(source))
        assert engine.lookup(tokens) == 40
        b = Paged.zeros(spec, layout, 12, 8)
        mask = engine.retrieve(tokens, kvcaches=b.tensors, slot_mapping=torch.tensor(target))
        assert mask.dtype == torch.bool
        assert mask.device.type == "cpu"
        assert mask.tolist() == [True] * 40
        assert np.array_equal(b.read(target), content(spec, tokens))
        untouched = [slot for slot in range(96) if slot not in target]
        assert not b.read(untouched).any()


def test_a_partial_chunk_hits_only_for_exactly_its_tokens() -> None:
    spec = spec_for("2BNHD")
    tokens, slots = tokens_of(40), list(range(40))
    with VCacheEngine(config(), spec) as engine:
        a = filled(spec, "2BNHD", tokens, slots)
        engine.store(tokens, kvcaches=a.tensors, slot_mapping=torch.tensor(slots))
        assert engine.lookup(tokens) == 40
        assert engine.lookup(tokens[:39]) == 32
        assert engine.lookup([*tokens, 1]) == 32
        assert engine.lookup([*tokens[:20], 1, *tokens[21:]]) == 16
        assert engine.lookup([1, *tokens[1:]]) == 0
    with VCacheEngine(config(cache={"save_partial_chunk": False}), spec) as engine:
        engine.store(tokens, kvcaches=a.tensors, slot_mapping=torch.tensor(slots))
        assert engine.lookup(tokens) == 32


def test_mask_and_offset_store_and_load_only_the_rest() -> None:
    spec = spec_for("2BNHD")
    tokens = tokens_of(64)
    slots = random_slots(64, 3)
    mask = [i >= 32 for i in range(64)]
    with VCacheEngine(config(), spec) as engine:
        a = filled(spec, "2BNHD", tokens, slots)
        engine.store(tokens, torch.tensor(mask), kvcaches=a.tensors, slot_mapping=torch.tensor(slots[20:]), offset=20)
        assert engine.lookup(tokens) == 0, "the head was never stored"
        keys = engine.chunk_keys(tokens)
        assert [engine.contains(key) for key in keys] == [-1, -1, 1, 1]
        b = Paged.zeros(spec, "2BNHD", 12, 8)
        got = engine.retrieve(tokens, mask, kvcaches=dict(zip("abc", b.tensors, strict=True)), slot_mapping=torch.tensor(slots))
        assert got.tolist() == mask
        assert not b.read(slots[:32]).any(), "tokens under False are left alone"
        assert np.array_equal(b.read(slots[32:]), content(spec, tokens, start=32))


def test_async_calls_give_the_same_result() -> None:
    spec = spec_for("BHNC", "bfloat16")
    tokens, slots = tokens_of(48), random_slots(48, 5)
    with VCacheEngine(config(), spec) as engine:
        a = filled(spec, "BHNC", tokens, slots)
        handle = engine.store_async(tokens, kvcaches=a.tensors, slot_mapping=torch.tensor(slots))
        assert handle.wait(10)
        assert handle.done()
        b = Paged.zeros(spec, "BHNC", 12, 8)
        loading = engine.retrieve_async(tokens, kvcaches=b.tensors, slot_mapping=torch.tensor(slots))
        assert loading.result(10).all()
        assert np.array_equal(b.read(slots), content(spec, tokens))
        with pytest.raises(ArgumentError, match="mask"):
            engine.retrieve_async(tokens, [True], kvcaches=b.tensors, slot_mapping=torch.tensor(slots))


KINDS: dict[str, Callable[[list[int]], Any]] = {
    "array": lambda ids: array("I", ids),
    "memoryview": lambda ids: memoryview(array("I", ids)),
    "numpy": lambda ids: np.array(ids, dtype=np.uint32),
    "torch": torch.tensor,
    "list": list,
}


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_async_calls_may_be_used_again_at_once(kind: str) -> None:
    """An `array` of token ids was not copied, and a slot mapping never: the caller's next prompt in the same memory gave the
    first one's KV the second one's names, or its rows. That was another prompt's KV under a verified True."""
    spec = spec_for("BHNC", "bfloat16")
    tokens, others, slots = tokens_of(48), tokens_of(48, 1), random_slots(48, 5)
    ids, mapping, mask = KINDS[kind](tokens), torch.tensor(slots), np.ones(48, dtype=bool)

    def use_again() -> None:
        ids[:] = KINDS[kind](others)
        mapping.copy_(torch.arange(48))
        mask[:] = False

    with VCacheEngine(config(transfer={"threads": 1}), spec) as engine:
        a, b = filled(spec, "BHNC", tokens, slots), Paged.zeros(spec, "BHNC", 12, 8)
        for paged, call in ((a, engine.store_async), (b, engine.retrieve_async)):
            free = threading.Event()
            engine._executor.submit(free.wait, 30)  # the only thread
            handle = call(ids, mask, kvcaches=paged.tensors, slot_mapping=mapping)
            use_again()
            free.set()
            handle.result(10)
            assert engine.lookup(others) == 0
            assert engine.lookup(tokens) == 48
            ids, mapping, mask = KINDS[kind](tokens), torch.tensor(slots), np.ones(48, dtype=bool)
        assert handle.result().all()
        assert np.array_equal(b.read(slots), content(spec, tokens))


def test_namespaces_never_meet() -> None:
    spec = spec_for("2BNHD", cache_salt="alice")
    other = spec_for("2BNHD", cache_salt="bob")
    tokens, slots = tokens_of(32), list(range(32))
    with VCacheEngine(config(), spec) as engine:
        a = filled(spec, "2BNHD", tokens, slots)
        engine.store(tokens, kvcaches=a.tensors, slot_mapping=torch.tensor(slots))
        with VCacheEngine(config(), other) as stranger:
            theirs, ours = stranger.chunk_keys(tokens), engine.chunk_keys(tokens)
        assert not set(theirs) & set(ours)
        assert [engine.contains(key) for key in theirs] == [-1, -1]
        assert [engine.contains(str(key)) for key in ours] == [1, 1]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"mask": [True] * 31}, ArgumentError, "mask: 31 entries for 32 tokens"),
        ({"mask": [True] * 16 + [False] * 16}, ArgumentError, "a False after a True"),
        ({"mask": [False] * 8 + [True] * 24}, ArgumentError, "multiple of chunk_size"),
        ({"slot_mapping": torch.arange(31)}, ArgumentError, "slot_mapping"),
        ({"slot_mapping": torch.arange(32) + 90}, ArgumentError, "slot_mapping"),
        ({"slot_mapping": torch.arange(32) - 1}, ArgumentError, "slot_mapping"),
        ({"slot_mapping": torch.arange(32).float()}, ArgumentError, "slot_mapping"),
        ({"tokens": [-1] * 32}, ArgumentError, "tokens"),
        ({"tokens": [[1, 2]] * 32}, ArgumentError, "tokens"),
        ({"kvcaches": [torch.zeros(2, 12, 8, 2, 8)] * 2}, SpecError, "2 tensors for spec.num_layers=3"),
        ({"kvcaches": [torch.zeros(2, 12, 8, 2, 8, dtype=torch.float16)] * 3}, (SpecError, LayoutError), "float16"),
        ({"kvcaches": [torch.zeros(7, 12, 8)] * 3}, (SpecError, LayoutError), r"\(7, 12, 8\)"),
        ({"kvcaches": "nonsense"}, (ArgumentError, LayoutError, SpecError), "kvcaches"),
    ],
)
def test_every_misuse_is_one_clear_error(change: dict[str, Any], error: Any, text: str) -> None:
    spec = spec_for("2BNHD")
    call: dict[str, Any] = {
        "tokens": tokens_of(32),
        "mask": None,
        "kvcaches": Paged.zeros(spec, "2BNHD", 12, 8).tensors,
        "slot_mapping": torch.arange(32),
        **change,
    }
    tokens, mask = call.pop("tokens"), call.pop("mask")
    with VCacheEngine(config(), spec) as engine:
        with pytest.raises(error, match=text) as caught:
            engine.store(tokens, mask, **call)
        assert "\n" not in str(caught.value)
        with pytest.raises(error, match=text):
            engine.retrieve(tokens, mask, **call)
        assert engine.get_stats()["counters"]["put_lapsed"] == 0


def test_offset_beyond_the_mask_is_an_error() -> None:
    spec = spec_for("2BNHD")
    with VCacheEngine(config(), spec) as engine:
        with pytest.raises(ArgumentError, match="offset"):
            engine.store(
                tokens_of(32), kvcaches=Paged.zeros(spec, "2BNHD", 12, 8).tensors, slot_mapping=torch.arange(16), offset=16
            )


def test_a_closed_engine_says_so() -> None:
    engine = VCacheEngine(config(), spec_for("2BNHD"))
    engine.close()
    engine.close()
    with pytest.raises(VCacheError, match="closed"):
        engine.lookup([1, 2, 3])


def test_eviction_under_pressure_never_returns_wrong_bytes() -> None:
    spec = spec_for("2BNHD")
    tight = config(segment={"size": "64KiB", "slab_size": "32KiB"})
    with VCacheEngine(tight, spec) as engine:
        a, b = Paged.zeros(spec, "2BNHD", 12, 8), Paged.zeros(spec, "2BNHD", 12, 8)
        for seed in range(40):
            tokens = tokens_of(40, seed)
            a.write(list(range(40)), content(spec, tokens))
            engine.store(tokens, kvcaches=a.tensors, slot_mapping=torch.arange(40))
        hits = 0
        for seed in range(40):
            tokens = tokens_of(40, seed)
            mask = engine.retrieve(tokens, kvcaches=b.tensors, slot_mapping=torch.arange(40))
            found = int(mask.sum())
            hits += found
            assert mask.tolist() == [i < found for i in range(40)]
            assert np.array_equal(b.read(list(range(found))), content(spec, tokens[:found])) if found else True
        counters = engine.get_stats()["counters"]
        assert 0 < hits < 40 * 40
        assert counters["lookups"] == counters["hits"] + counters["misses"] + counters["errors"]
        engine.cache.check_integrity()


def test_storage_tier_continues_the_prefix_and_survives_eviction() -> None:
    spec = spec_for("2BNHD")
    small = config(segment={"size": "64KiB", "slab_size": "32KiB"}, storage={"kind": "memory"})
    with VCacheEngine(small, spec) as engine:
        a = Paged.zeros(spec, "2BNHD", 12, 8)
        for seed in range(20):
            tokens = tokens_of(72, seed)
            a.write(list(range(72)), content(spec, tokens))
            engine.store(tokens, kvcaches=a.tensors, slot_mapping=torch.arange(72))
            assert engine.flush(10)
        b = Paged.zeros(spec, "2BNHD", 12, 8)
        for seed in range(20):
            tokens = tokens_of(72, seed)
            assert engine.lookup(tokens) == 72
            mask = engine.retrieve(tokens, kvcaches=b.tensors, slot_mapping=torch.arange(72))
            assert mask.all(), seed
            assert np.array_equal(b.read(list(range(72))), content(spec, tokens))
        tiers = engine.get_stats()["operations"] if "operations" in engine.get_stats() else engine.get_stats()
        assert "storage" in str(tiers)


def test_many_threads_share_one_engine() -> None:
    spec = spec_for("2BNHD")
    failures: list[str] = []
    with VCacheEngine(config(segment={"size": "256KiB", "slab_size": "64KiB"}), spec) as engine:

        def work(worker: int) -> None:
            a = Paged.zeros(spec, "2BNHD", 12, 8)
            for turn in range(15):
                tokens = tokens_of(40, (worker + turn) % 6)
                a.write(list(range(40)), content(spec, tokens))
                engine.store(tokens, kvcaches=a.tensors, slot_mapping=torch.arange(40))
                b = Paged.zeros(spec, "2BNHD", 12, 8)
                found = int(engine.retrieve(tokens, kvcaches=b.tensors, slot_mapping=torch.arange(40)).sum())
                if found and not np.array_equal(b.read(list(range(found))), content(spec, tokens[:found])):
                    failures.append(f"worker {worker} turn {turn}: wrong bytes")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert not failures
        engine.cache.check_integrity()


def test_default_construction_works_without_configuration() -> None:
    spec = spec_for("2BNHD")
    with VCacheEngine(VCacheConfig(), spec) as engine:
        assert engine.lookup([1, 2, 3]) == 0
        assert engine.get_stats()["lent_bytes"] > 0
