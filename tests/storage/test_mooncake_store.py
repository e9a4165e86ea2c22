"""The storage tier on a real Mooncake store: contract, tiers, tenants, restarts, deaths, a full store."""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support.cluster import Command, eventually
from support.commands import invoke
from support.paged import Paged, content, spec_for

from vcache import KVCacheSpec, VCacheConfig, VCacheEngine
from vcache.errors import ConfigError, StorageError
from vcache.keys import CacheKey
from vcache.storage.mooncake import MooncakeStorage
from vcache.storage.mooncake_options import MooncakeOptions

if TYPE_CHECKING:
    from conftest import Store

pytestmark = pytest.mark.processes
LAYOUT = "2BNHD"
DEADLINE = 2.0


def engine_on(store: Store, spec: KVCacheSpec, *, size: str = "64KiB", **storage: Any) -> VCacheEngine:
    """An engine with room for few chunks of its own, so that storage matters."""
    config = VCacheConfig.from_env(
        {},
        segment={"kind": "host", "size": size, "slab_size": "32KiB"},
        cache={"chunk_size": 16},
        storage={"kind": "mooncake", "options": store.options, "deadline": DEADLINE, **storage},
    )
    return VCacheEngine(config, spec, device="cpu")


def tokens_of(seed: int, count: int = 64) -> list[int]:
    return [seed * 1000 + i for i in range(count)]


def put(engine: VCacheEngine, spec: KVCacheSpec, tokens: list[int]) -> None:
    paged = Paged.zeros(spec, LAYOUT, 12, 8)
    paged.write(list(range(len(tokens))), content(spec, tokens))
    engine.store(tokens, kvcaches=paged.tensors, slot_mapping=torch.arange(len(tokens)))


def check(engine: VCacheEngine, spec: KVCacheSpec, tokens: list[int]) -> int:
    """Retrieve; whatever is True must be byte-equal. The number of True."""
    paged = Paged.zeros(spec, LAYOUT, 12, 8)
    mask = engine.retrieve(tokens, kvcaches=paged.tensors, slot_mapping=torch.arange(len(tokens)))
    found = int(mask.sum())
    assert mask.tolist() == [i < found for i in range(len(tokens))]
    if found:
        assert np.array_equal(paged.read(list(range(found))), content(spec, tokens[:found])), "wrong bytes under a True"
    return found


def counters(engine: VCacheEngine) -> dict[str, int]:
    return engine.get_stats()["counters"]  # type: ignore[no-any-return]


def test_the_contract_of_the_tier(store: Store) -> None:
    store.start_master()
    store.lend("16MiB")
    tier = MooncakeStorage(store.options)
    assert tier.connected
    memory = memoryview(mmap.mmap(-1, 2**20))
    tier.register(memory)
    tier.register(memory)
    keys = [CacheKey(os.urandom(16), os.urandom(16)) for _ in range(3)]
    one, two = os.urandom(1000), os.urandom(2000)
    memory[:1000], memory[4096 : 4096 + 2000] = one, two
    assert tier.put(keys[:2], 0, [memory[:1000], memory[4096 : 4096 + 2000]]) == [True, True]
    memory[:1000] = bytes(1000)
    assert tier.put(keys[:1], 0, [memory[:1000]]) == [True], "values are immutable: the second is ignored"
    assert [tier.prefix(keys, 0), tier.prefix(keys[2:], 0), tier.prefix(keys, 1)] == [2, 0, 0]
    buffers = [memory[8192 : 8192 + 1000], memory[16384 : 16384 + 4000], memory[32768 : 32768 + 10]]
    assert tier.get(keys, 0, buffers) == [1000, 2000, -1]
    assert bytes(buffers[0]) == one
    assert bytes(buffers[1][:2000]) == two
    assert tier.get(keys[:1], 0, [memory[:999]]) == [-1], "longer than the buffer"
    tier.remove([keys[0], keys[2]], 0)
    assert tier.prefix(keys, 0) == 0
    full = memory[: 2**20]
    more = [CacheKey(bytes(16), os.urandom(16)) for _ in range(40)]
    stored = tier.put(more, 0, [full] * len(more))
    assert 0 < sum(stored) < len(more), "a full store refuses"
    tier.unregister(memory)
    tier.close()
    tier.close()
    with pytest.raises(StorageError, match="closed"):
        tier.prefix(keys, 0)


def test_write_through_restart_and_tenants(store: Store) -> None:
    store.start_master()
    store.lend()
    alice, bob = spec_for(LAYOUT, cache_salt="alice"), spec_for(LAYOUT, cache_salt="bob")
    with engine_on(store, alice) as engine:
        for seed in range(8):
            put(engine, alice, tokens_of(seed))
            assert engine.flush(20)
        written = counters(engine)["storage_written"]
        assert written > 8, "chunks went through to storage"
        # Some chunks are in the pool, the others only in storage: one call finds and loads all of them.
        for seed in range(8):
            assert engine.lookup(tokens_of(seed)) == 64
            assert check(engine, alice, tokens_of(seed)) == 64
        tiers = engine.get_stats()["operations"]["retrieve"]
        assert tiers["storage"]["bytes"] > 0
        assert tiers["dram"]["bytes"] > 0
    # Everything but the store is new.
    with engine_on(store, alice, write="never", promote=True) as engine:
        key = engine.chunk_keys(tokens_of(3))[0]
        assert engine.contains(key) == 1
        assert check(engine, alice, tokens_of(3)) == 64
        assert counters(engine)["storage_promoted"] == 4
        assert "dram" not in engine.get_stats()["operations"]["retrieve"]
        assert check(engine, alice, tokens_of(3)) == 64
        assert engine.get_stats()["operations"]["retrieve"]["dram"]["bytes"] > 0, "the second hit comes from the pool"
        put(engine, alice, tokens_of(99))
        assert engine.flush(10)
        assert counters(engine)["storage_written"] == 0
        engine._resources.check_integrity()
    with engine_on(store, bob) as engine:
        assert engine.lookup(tokens_of(3)) == 0
        assert check(engine, bob, tokens_of(3)) == 0


def test_the_master_dies_during_traffic_and_comes_back(store: Store) -> None:
    master = store.start_master()
    store.lend()
    spec = spec_for(LAYOUT)
    with engine_on(store, spec) as engine:
        for seed in range(4):
            put(engine, spec, tokens_of(seed))
            assert engine.flush(20)
        hot = tokens_of(3, 16)
        assert check(engine, spec, tokens_of(0)) == 64
        stop, slowest, failures = threading.Event(), [0.0], []

        def traffic() -> None:
            turn = 0
            while not stop.is_set():
                turn += 1
                began = time.monotonic()
                try:
                    put(engine, spec, tokens_of(100 + turn % 5, 32))
                    check(engine, spec, tokens_of(turn % 4))
                except BaseException as error:
                    failures.append(error)
                    raise
                # At most one look-up and one get run into their deadlines.
                slowest[0] = max(slowest[0], time.monotonic() - began)
                stop.wait(0.01)

        thread = threading.Thread(target=traffic)
        thread.start()
        try:
            master.close()
            os.kill(store.donors[0].process.pid, signal.SIGKILL)  # the owner of the memory as well
            put(engine, spec, hot)
            eventually(
                lambda: engine.lookup(tokens_of(7777)) == 0 and counters(engine)["storage_errors"], what="errors are counted"
            )
            errors = counters(engine)["storage_errors"]
            eventually(lambda: counters(engine)["storage_errors"] > errors + 20, what="calls fail at once while it is away")
            began = time.monotonic()
            put(engine, spec, hot)
            assert check(engine, spec, hot) == 16, "hits of the pool go on"
            assert time.monotonic() - began < 1.0
            store.start_master()
            store.lend()
            written, seeds = counters(engine)["storage_written"], itertools.count(200)

            def reached() -> bool:
                put(engine, spec, tokens_of(next(seeds), 16))  # new chunks: those in the pool are not written again
                return counters(engine)["storage_written"] > written

            eventually(reached, 40, what="writes reach the new store by themselves")
        finally:
            stop.set()
            thread.join(30)
        assert not thread.is_alive()
        assert not failures
        assert slowest[0] < 2 * 1.2 * DEADLINE
        found = counters(engine)
        assert found["lookups"] == found["hits"] + found["misses"] + found["errors"]


def test_an_engine_starts_and_ends_without_a_master(store: Store) -> None:
    spec = spec_for(LAYOUT)
    began = time.monotonic()
    engine = engine_on(store, spec)
    put(engine, spec, tokens_of(1, 32))
    assert check(engine, spec, tokens_of(1, 32)) == 32
    assert time.monotonic() - began < 3, "an absent master costs nothing"
    store.start_master()
    store.lend()
    seeds = itertools.count(100)

    def written() -> bool:
        put(engine, spec, tokens_of(next(seeds), 16))
        return counters(engine)["storage_written"] > 0

    eventually(written, 40, what="joined by itself")
    store.masters.pop().close()
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 15


def test_a_full_store_drops_and_the_engine_goes_on(store: Store) -> None:
    store.start_master()
    store.lend("16MiB")
    spec = spec_for(LAYOUT, layers=24, heads=8, head_size=64)  # 1.5 MiB in a chunk
    with engine_on(store, spec, size="16MiB", queue="64MiB") as engine:
        for seed in range(8):
            put(engine, spec, tokens_of(seed))
            assert engine.flush(30)
        found = counters(engine)
        assert found["storage_rejected"] + found["storage_written"] >= 16
        assert found["storage_rejected"] > 0
        assert check(engine, spec, tokens_of(7)) > 0


def test_serve_with_mooncake_supervises_a_master(store: Store) -> None:
    env = {**store.env, "VCACHE_MANAGER_ADDRESS": f"unix://{store.folder}/manager.sock"}
    serve = Command(store.folder, "serve", "--with-mooncake", env=env)
    store.donors.append(serve)
    serve.wait_for("manager ready")
    line = serve.log.read_text().splitlines()[0]
    assert line.startswith(f"mooncake_master at {store.parsed.master} (pid ")
    first = int(line.partition("(pid ")[2].partition(")")[0])
    store.lend("16MiB")
    os.kill(first, signal.SIGKILL)
    serve.wait_for("mooncake_master is gone")
    from vcache.storage.mooncake_trial import try_store

    def usable() -> bool:
        try:
            try_store(store.parsed, 10, transfer=True)
        except StorageError:
            return False
        return True

    eventually(usable, 30, what="a new master, with the memory lent before")
    serve.signal(signal.SIGTERM)
    assert serve.process.wait(15) == 0
    with pytest.raises(StorageError, match="mooncake"):
        try_store(store.parsed, 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mastr": "x"}, "unknown mastr"),
        ({"master": "nowhere"}, "master must be host:port"),
        ({"protocol": "carrier-pigeon"}, "protocol must be tcp or rdma"),
        ({"buffer": "lots"}, "buffer"),
        ({"replicas": "0"}, "replicas must be a number in"),
    ],
)
def test_wrong_options_are_one_clear_error(options: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        MooncakeOptions.parse(options)
    assert "\n" not in str(caught.value)


def test_doctor_tries_the_store(store: Store) -> None:
    from vcache.cli.doctor import mooncake

    config = VCacheConfig.from_env({}, storage={"kind": "mooncake", "options": store.options})

    def line() -> tuple[str, str]:
        check = list(mooncake(config))[-1]
        assert check.name == "Mooncake store"
        assert check.status == "ok" or (check.why and check.advice)
        return check.status, check.detail

    assert line() == ("fail", f"no master answers at {store.parsed.master}")
    store.start_master()
    status, detail = line()
    assert status == "fail"
    assert "nobody lends memory" in detail
    store.lend("16MiB")
    assert line() == ("ok", f"master at {store.parsed.master}: a put and a get work")


def test_commands_refuse_with_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in store.env.items():
        monkeypatch.setenv(name, value)
    assert "only without --tier storage" in invoke("lend", "--tier", "storage", "--kind", "host").output
    result = invoke("lend", "--tier", "storage", "--size", "1MiB")
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "16MiB or more" in result.output
    monkeypatch.setattr("vcache.storage.mooncake_master.find_master", lambda: None)
    result = invoke("serve", "--with-mooncake", "--address", f"unix://{store.folder}/m.sock")
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "mooncake_master is not installed" in result.output


def test_the_benchmark_compares_both_ways(store: Store) -> None:
    from vcache.bench.storage import bench_storage

    report = bench_storage(32 * 2**20, 1, lambda text: None)
    assert [row["operation"] for row in report.rows] == ["put", "get"]
    assert all(row["ratio"] > 0 and row["raw"] > 0 for row in report.rows)
