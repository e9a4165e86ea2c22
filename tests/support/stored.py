"""Engines on a storage tier: small pools, so that what is stored lies mostly below them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from support.cluster import eventually
from support.paged import Paged, content

from vcache import KVCacheSpec, VCacheConfig, VCacheEngine

LAYOUT = "2BNHD"
DEADLINE = 2.0


def engine_on(
    options: dict[str, str], spec: KVCacheSpec, *, size: str = "64KiB", join: bool = True, **storage: Any
) -> VCacheEngine:
    """An engine with room for few chunks of its own, so that storage matters. `join`: it has joined the store."""
    config = VCacheConfig.from_env(
        {},
        segment={"kind": "host", "size": size, "slab_size": "32KiB"},
        cache={"chunk_size": 16},
        storage={"kind": "mooncake", "options": options, "deadline": DEADLINE, **storage},
    )
    engine = VCacheEngine(config, spec, device="cpu")
    if join:
        eventually(lambda: not _storage_fails(engine), 30, what="the engine joins the store")
    return engine


def _storage_fails(engine: VCacheEngine) -> bool:
    before = counters(engine)["storage_errors"]
    engine.lookup(tokens_of(9999))
    return counters(engine)["storage_errors"] > before


def tokens_of(seed: int, count: int = 64) -> list[int]:
    return [seed * 1000 + i for i in range(count)]


def put(engine: VCacheEngine, spec: KVCacheSpec, tokens: list[int], *, bytes_of: list[int] | None = None) -> None:
    """Store the KV of `tokens`; with `bytes_of`, the bytes of those instead."""
    paged = Paged.zeros(spec, LAYOUT, 12, 8)
    paged.write(list(range(len(tokens))), content(spec, bytes_of or tokens))
    engine.store(tokens, kvcaches=paged.tensors, slot_mapping=torch.arange(len(tokens)))


def check(engine: VCacheEngine, spec: KVCacheSpec, tokens: list[int], *, bytes_of: list[int] | None = None) -> int:
    """Retrieve; whatever is True must be byte-equal. The number of True."""
    paged = Paged.zeros(spec, LAYOUT, 12, 8)
    mask = engine.retrieve(tokens, kvcaches=paged.tensors, slot_mapping=torch.arange(len(tokens)))
    found = int(mask.sum())
    assert mask.tolist() == [i < found for i in range(len(tokens))]
    if found:
        expected = content(spec, (bytes_of or tokens)[:found])
        assert np.array_equal(paged.read(list(range(found))), expected), "wrong bytes under a True"
    return found


def counters(engine: VCacheEngine) -> dict[str, int]:
    return engine.get_stats()["counters"]  # type: ignore[no-any-return]
