"""The engine against a plain model of a cache: a dictionary from prompt prefixes to bytes. Hypothesis chooses the history."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.paged import Paged, content, spec_for

from vcache import KVCacheSpec, VCacheConfig, VCacheEngine

CHUNK, SLOTS = 8, 64


def make_prompt(family: int, length: int, fork: int, tail: int) -> list[int]:
    """`length` tokens: those of the family up to `fork`, then all `tail`."""
    shared = min(length, fork)
    return [*range(family * 100, family * 100 + shared), *[tail] * (length - shared)]


def mapping(slots: list[int]) -> torch.Tensor:
    return torch.tensor(slots, dtype=torch.int64)


prompts = st.builds(
    make_prompt,
    family=st.integers(0, 2),
    length=st.sampled_from([1, 7, 8, 16, 21, 24, 40]),
    fork=st.sampled_from([8, 13, 24, 99]),
    tail=st.integers(900, 902),
)
"""Few families that share prefixes and fork inside and between chunks."""


class EngineMachine(RuleBasedStateMachine):
    """`stored`: every prefix that was ever stored, which is all that may ever be found (rule I1)."""

    capacity = "128KiB"
    slab = "16KiB"
    storage = "none"

    def __init__(self) -> None:
        super().__init__()
        self.spec: KVCacheSpec = spec_for("2BNHD", "bfloat16", layers=2, heads=1, head_size=4)
        config = VCacheConfig.from_env(
            {},
            segment={"kind": "host", "size": self.capacity, "slab_size": self.slab},
            cache={"chunk_size": CHUNK},
            storage={"kind": self.storage},
        )
        self.engine = VCacheEngine(config, self.spec, device="cpu")
        self.caches = [Paged.zeros(self.spec, "2BNHD", 8, 8), Paged.zeros(self.spec, "B2NHD", 4, 16)]
        self.stored: set[tuple[int, ...]] = set()
        self.asked = 0

    def teardown(self) -> None:
        self.engine.close()

    def slots(self, seed: int, count: int) -> list[int]:
        return np.random.default_rng(seed).permutation(SLOTS)[:count].tolist()

    def prefixes(self, tokens: list[int]) -> list[tuple[int, ...]]:
        return [tuple(tokens[: min(end, len(tokens))]) for end in range(CHUNK, len(tokens) + CHUNK, CHUNK)]

    def known(self, tokens: list[int]) -> int:
        """Tokens of the longest prefix of which every chunk was stored at some time."""
        found = 0
        for prefix in self.prefixes(tokens):
            if prefix not in self.stored:
                break
            found = len(prefix)
        return found

    @rule(tokens=prompts, seed=st.integers(0, 9), cache=st.integers(0, 1), data=st.data())
    def store(self, tokens: list[int], seed: int, cache: int, data: st.DataObject) -> None:
        skipped = CHUNK * data.draw(st.integers(0, len(tokens) // CHUNK))
        offset = data.draw(st.integers(0, skipped))
        slots = self.slots(seed, len(tokens))
        self.caches[cache].write(slots, content(self.spec, tokens))
        mask = [i >= skipped for i in range(len(tokens))]
        self.engine.store(
            tokens,
            mask,
            kvcaches=self.caches[cache].tensors,
            slot_mapping=mapping(slots[offset:]),
            offset=offset,
        )
        self.stored.update(prefix for prefix in self.prefixes(tokens) if len(prefix) > skipped)
        if self.storage != "none":
            assert self.engine.flush(20)
        self.check_lookup(tokens)

    @rule(tokens=prompts, seed=st.integers(0, 9), cache=st.integers(0, 1), data=st.data())
    def retrieve(self, tokens: list[int], seed: int, cache: int, data: st.DataObject) -> None:
        skipped = CHUNK * data.draw(st.integers(0, len(tokens) // CHUNK))
        slots, target = self.slots(seed, len(tokens)), self.caches[cache]
        for tensor in target.tensors:
            tensor.zero_()
        mask = self.engine.retrieve(
            tokens,
            [i >= skipped for i in range(len(tokens))],
            kvcaches=target.tensors,
            slot_mapping=mapping(slots),
        ).tolist()
        self.asked += len(self.prefixes(tokens)) - skipped // CHUNK
        end = skipped + sum(mask)
        assert mask == [skipped <= i < end for i in range(len(tokens))]
        if end > skipped:
            assert np.array_equal(target.read(slots[skipped:end]), content(self.spec, tokens[:end], start=skipped))
        for prefix in self.prefixes(tokens):
            assert not skipped < len(prefix) <= end or prefix in self.stored
        others = [slot for slot in range(SLOTS) if slot not in slots[skipped:]]
        assert not target.read(others).any()

    @rule(tokens=prompts)
    def lookup(self, tokens: list[int]) -> None:
        self.check_lookup(tokens)

    def check_lookup(self, tokens: list[int]) -> None:
        found = self.engine.lookup(tokens)
        self.asked += len(self.prefixes(tokens))
        assert found <= self.known(tokens)
        if self.complete:
            assert found == self.known(tokens)
        tiers = [self.engine.contains(key) for key in self.engine.chunk_keys(tokens)]
        assert [tier >= 0 for tier in tiers][: len([p for p in self.prefixes(tokens) if len(p) <= found])] == [
            True for p in self.prefixes(tokens) if len(p) <= found
        ]

    @property
    def complete(self) -> bool:
        """Whether nothing that was stored can have been evicted for good."""
        return self.capacity == "128KiB" or self.storage != "none"

    @precondition(lambda self: self.storage == "none")
    @rule()
    def clear(self) -> None:
        self.engine.manager.clear()
        self.stored.clear()

    @invariant()
    def counters_reconcile(self) -> None:
        counters: dict[str, Any] = self.engine.get_stats()["counters"]
        assert counters["lookups"] == self.asked == counters["hits"] + counters["misses"] + counters["errors"]
        assert counters["errors"] == counters["stale_reads"] == counters["manager_errors"] == 0

    @invariant()
    def integrity(self) -> None:
        self.engine.cache.check_integrity()


class TightMachine(EngineMachine):
    """The pool holds a fraction of what is stored: evictions all the time."""

    capacity = "4KiB"
    slab = "2KiB"


class TieredMachine(TightMachine):
    """Tight, but a storage tier keeps everything."""

    storage = "memory"


LIMITS = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    report_multiple_bugs=False,
)
TestRoomy = EngineMachine.TestCase
TestRoomy.settings = LIMITS
TestTight = TightMachine.TestCase
TestTight.settings = LIMITS
TestTiered = TieredMachine.TestCase
TestTiered.settings = LIMITS
