"""Demotion and write on eviction with a real engine and a real manager in one process; VRAM is emulated."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.cluster import eventually
from support.emulated_vram import emulate_vram
from support.paged import Paged, content, spec_for

from vcache import VCacheConfig, VCacheEngine
from vcache.config import ByteSize, SegmentConfig
from vcache.lender.lender import Lender
from vcache.segment.host import HostBacking

LAYOUT = "2BNHD"
CHUNK = 16
SPEC = spec_for(LAYOUT)
SLOT = SPEC.payload_bytes(CHUNK)


def prompt(seed: int, chunks: int = 4) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(2**31) for i in range(CHUNK * chunks)]


class Host:
    """An engine that lends `vram` slots of emulated VRAM, and `dram` slots of host memory beside it."""

    def __init__(self, vram: int, dram: int, **sections: Any) -> None:
        base: dict[str, Any] = {
            "manager": {"high_watermark": 0.8, "low_watermark": 0.5, "eviction": "lru"},
            "segment": {"size": str(vram * SLOT), "slab_size": str(4 * SLOT)},
            "cache": {"chunk_size": CHUNK},
        }
        for name, values in sections.items():
            base[name] = {**base.get(name, {}), **values}
        self.engine = VCacheEngine(VCacheConfig.from_env({}, **base), SPEC)
        self.manager = self.engine.manager
        self.vram = vram
        self.lender: Lender | None = None
        if dram:
            self._lend(dram)
        self.paged = Paged.zeros(SPEC, LAYOUT, 12, 8)

    def _lend(self, slots: int) -> None:
        backing = HostBacking()
        config = SegmentConfig(size=ByteSize(slots * SLOT), slab_size=ByteSize(4 * SLOT))
        self.lender = Lender(self.manager, backing, config)
        segments = self.engine.pool.segments
        segments.add_local(self.lender.uuid, self.lender.slab, backing)
        self.lender.wait_mounted(5)
        for info in self.manager.segments():
            segments.update(info)

    def store(self, tokens: list[int]) -> None:
        self.paged.write(list(range(len(tokens))), content(SPEC, tokens))
        self.engine.store(tokens, kvcaches=self.paged.tensors, slot_mapping=torch.arange(len(tokens)))

    def check(self, tokens: list[int]) -> int:
        """Retrieve; whatever is True must be byte-equal. Number of True."""
        paged = Paged.zeros(SPEC, LAYOUT, 12, 8)
        mask = self.engine.retrieve(tokens, kvcaches=paged.tensors, slot_mapping=torch.arange(len(tokens)))
        found = int(mask.sum())
        assert mask.tolist() == [i < found for i in range(len(tokens))]
        if found:
            assert np.array_equal(paged.read(list(range(found))), content(SPEC, tokens[:found])), "wrong bytes under a True"
        return found

    def tiers(self, tokens: list[int]) -> list[int]:
        return [self.engine.contains(key) for key in self.engine.chunk_keys(tokens)]

    def count(self, name: str) -> int:
        return int(self.engine.get_stats()["counters"][name])

    def vram_load(self) -> float:
        used = [s.slots_used + s.slots_processing for s in self.manager.stats().segments if s.info.kind == "cuda"]
        return sum(used) / self.vram

    def rest(self) -> None:
        """Until nothing moves."""
        maker = self.engine.cache.room_maker
        assert maker is not None
        assert maker.wait_idle(10)

    def settle(self) -> None:
        """Until nothing moves and VRAM has room."""
        eventually(lambda: self.vram_load() <= 0.8, 5, what="VRAM has room")
        self.rest()
        assert self.engine.flush(10)

    def close(self) -> None:
        self.engine.cache.check_integrity()
        if self.lender is not None:
            self.lender.close()
        self.engine.close()


@pytest.fixture
def make_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Host]]:
    made: list[Host] = []

    def make(vram: int = 16, dram: int = 32, amid: Any = None, **sections: Any) -> Host:
        emulate_vram(monkeypatch.setattr, amid)
        made.append(Host(vram, dram, **sections))
        return made[-1]

    yield make
    for host in made:
        host.close()


def test_cold_chunks_go_down_and_come_back_byte_equal(make_host: Callable[..., Host]) -> None:
    host = make_host()
    prompts = [prompt(seed) for seed in range(9)]
    for tokens in prompts:
        host.store(tokens)
        host.settle()
    assert host.tiers(prompts[-1]) == [0] * 4, "the newest stay in VRAM"
    assert host.tiers(prompts[0]) == [1] * 4, "the coldest are in host memory"
    assert host.count("demoted_chunks") >= 9 * 4 - 16
    assert host.count("demote_refused") == host.count("put_no_space") == 0
    for tokens in prompts:
        assert host.check(tokens) == len(tokens), "nothing was lost"
    assert host.count("stale_reads") == 0
    assert host.engine.get_stats()["operations"]["demote"]["dram"]["bytes"] == host.count("demoted_chunks") * SLOT
    assert host.engine.get_stats()["operations"]["retrieve"]["dram"]["bytes"] > 0


def test_chunks_in_use_stay_in_vram(make_host: Callable[..., Host]) -> None:
    host = make_host()
    hot = prompt(0)
    host.store(hot)
    lease = host.engine.pool.acquire([key.digest for key in host.engine.chunk_keys(hot)])
    assert len(lease.locations) == 4
    for seed in range(1, 9):
        host.store(prompt(seed))
        host.settle()
    assert host.tiers(hot) == [0] * 4
    assert host.count("demoted_chunks") > 0
    host.engine.pool.release(lease.id)
    assert host.check(hot) == len(hot)


def test_a_reader_amid_the_copy_keeps_the_chunk_where_it_is(make_host: Callable[..., Host]) -> None:
    wanted = prompt(0)

    def read(*arguments: Any) -> None:
        leases.append(host.engine.pool.acquire([key.digest for key in host.engine.chunk_keys(wanted)]))
        assert host.check(wanted) == len(wanted)

    leases: list[Any] = []
    host = make_host(amid=read)
    host.store(wanted)
    for seed in range(1, 6):
        host.store(prompt(seed))
        host.rest()
    assert host.count("demote_refused") > 0
    assert host.tiers(wanted) == [0] * 4
    for lease in leases:
        host.engine.pool.release(lease.id)
    assert host.check(wanted) == len(wanted)


def read_twice_below(host: Host) -> tuple[list[int], list[int]]:
    """A prompt that went down to host memory, and one that filled VRAM until it was dropped; the first is read twice."""
    hot, cold = prompt(0), [prompt(seed) for seed in range(1, 4)]
    for tokens in [hot, *cold]:
        host.store(tokens)
        host.settle()
    assert 1 in host.tiers(hot)
    before = host.tiers(hot)
    host.manager.remove([key.digest for tokens in cold for key in host.engine.chunk_keys(tokens)])
    for _ in range(2):
        assert host.check(hot) == len(hot)
    return hot, before


def test_what_is_read_again_comes_up_byte_equal(make_host: Callable[..., Host]) -> None:
    host = make_host()
    hot, before = read_twice_below(host)
    eventually(lambda: host.tiers(hot) == [0] * 4, 5, what="it is in VRAM")
    host.rest()
    assert host.check(hot) == len(hot)
    assert host.count("promoted_chunks") == before.count(1)
    assert host.count("promote_refused") == host.count("stale_reads") == 0
    assert host.engine.get_stats()["operations"]["promote"]["vram"]["bytes"] == host.count("promoted_chunks") * SLOT


def test_without_promotion_it_stays_below(make_host: Callable[..., Host]) -> None:
    host = make_host(cache={"promote": False})
    hot, before = read_twice_below(host)
    host.rest()
    assert host.tiers(hot) == before
    assert host.count("promoted_chunks") == 0


def test_switched_off_nothing_moves(make_host: Callable[..., Host]) -> None:
    host = make_host(cache={"demote": False, "promote": False})
    assert host.engine.cache.room_maker is None
    for seed in range(9):
        host.store(prompt(seed))
    assert host.count("demoted_chunks") == 0


def test_host_memory_that_is_full_loses_its_coldest(make_host: Callable[..., Host]) -> None:
    host = make_host(vram=16, dram=8)
    for seed in range(12):
        host.store(prompt(seed))
        host.rest()
        for known in range(seed + 1):
            host.check(prompt(known))
    assert host.tiers(prompt(11)) == [0] * 4
    assert sum(host.check(prompt(seed)) for seed in range(12)) >= CHUNK * 12
    assert host.count("demoted_chunks") > 0


def test_never_a_wrong_byte_while_everything_moves(make_host: Callable[..., Host]) -> None:
    host = make_host(vram=12, dram=12, storage={"kind": "memory", "write": "eviction"})
    failures: list[str] = []

    def work(worker: int) -> None:
        rng = random.Random(worker)
        paged, back = Paged.zeros(SPEC, LAYOUT, 12, 8), Paged.zeros(SPEC, LAYOUT, 12, 8)
        for _ in range(40):
            tokens = prompt(rng.randrange(12))
            slots = torch.arange(len(tokens))
            paged.write(slots.tolist(), content(SPEC, tokens))
            host.engine.store(tokens, kvcaches=paged.tensors, slot_mapping=slots)
            tokens = prompt(rng.randrange(12))
            found = int(host.engine.retrieve(tokens, kvcaches=back.tensors, slot_mapping=slots).sum())
            if found and not np.array_equal(back.read(list(range(found))), content(SPEC, tokens[:found])):
                failures.append(f"worker {worker}: wrong bytes")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures
    assert host.count("demoted_chunks") > 0
    assert host.count("spilled_chunks") > 0
    counters = host.engine.get_stats()["counters"]
    assert counters["lookups"] == counters["hits"] + counters["misses"] + counters["errors"]


# -- write on eviction -------------------------------------------------------------------------------------------------


def in_storage(host: Host, tokens: list[int]) -> int:
    storage = host.engine.cache.storage
    assert storage is not None
    return storage.prefix([key.digest for key in host.engine.chunk_keys(tokens)])


def test_nothing_is_written_until_the_pool_runs_full_and_nothing_is_lost_then(make_host: Callable[..., Host]) -> None:
    host = make_host(vram=12, dram=12, storage={"kind": "memory", "write": "eviction"})
    prompts = [prompt(seed) for seed in range(12)]
    for tokens in prompts[:3]:
        host.store(tokens)
        host.settle()
        assert host.count("storage_written") == host.count("spilled_chunks") == 0
    assert not any(in_storage(host, tokens) for tokens in prompts)
    for seed, tokens in enumerate(prompts[3:], start=3):
        host.store(tokens)
        host.settle()
        assert all(in_storage(host, known) for known in prompts[: max(0, seed - 4)]), "the coldest are written first"
        assert not in_storage(host, prompts[seed])
    assert host.count("spilled_chunks") >= 4 * (12 - 6)
    gone = [tokens for tokens in prompts if -1 in host.manager.tiers([k.digest for k in host.engine.chunk_keys(tokens)])]
    assert gone, "the pool is too small for all"
    for tokens in prompts:
        assert host.check(tokens) == len(tokens), "what was evicted comes from storage"
    assert host.engine.get_stats()["operations"]["retrieve"]["storage"]["bytes"] > 0
    assert host.count("spill_errors") == host.count("storage_errors") == 0


def test_chunks_that_find_no_slot_are_written_at_once(make_host: Callable[..., Host]) -> None:
    host = make_host(vram=4, dram=0, storage={"kind": "memory", "write": "eviction"})
    first = prompt(0)
    host.store(first)
    lease = host.engine.pool.acquire([key.digest for key in host.engine.chunk_keys(first)])
    host.store(prompt(1))
    assert host.engine.flush(10)
    assert in_storage(host, prompt(1)) == 4
    assert host.count("storage_written") == 4
    assert host.check(prompt(1)) == len(prompt(1))
    host.engine.pool.release(lease.id)


def test_a_policy_of_never_writes_nothing(make_host: Callable[..., Host]) -> None:
    host = make_host(vram=8, dram=8, storage={"kind": "memory", "write": "never"})
    for seed in range(8):
        host.store(prompt(seed))
    assert host.engine.flush(10)
    host.rest()
    assert not any(in_storage(host, prompt(seed)) for seed in range(8))
