"""The storage tier on a real Mooncake store: contract, tiers, tenants, restarts, deaths, a full store."""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from support.cluster import Command, eventually, free_port
from support.commands import invoke
from support.paged import spec_for
from support.stored import LAYOUT, check, counters, engine_on, put, tokens_of

from vcache import VCacheConfig
from vcache.errors import ConfigError, StorageError
from vcache.keys import CacheKey
from vcache.storage.mooncake import MooncakeStorage
from vcache.storage.mooncake_options import MooncakeOptions

if TYPE_CHECKING:
    from conftest import Store

pytestmark = pytest.mark.processes


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
    more = [CacheKey(bytes(16), os.urandom(16)) for _ in range(40)]
    for key in more:  # 40 MiB into 16: room is made for each, by the oldest
        assert tier.put([key], 0, [memory]) == [True]
    assert tier.prefix(more[-4:], 0) == 4
    assert tier.prefix(more[:1], 0) == 0
    huge = memoryview(mmap.mmap(-1, 24 * 2**20))
    began = time.monotonic()
    assert tier.put([CacheKey(bytes(16), os.urandom(16))], 0, [huge]) == [False], "never fits"
    patient = time.monotonic() - began
    began = time.monotonic()
    assert tier.put([CacheKey(bytes(16), os.urandom(16))], 0, [huge]) == [False]
    assert time.monotonic() - began < patient / 2, "a store that gives no room is not waited for again"
    assert tier.put([CacheKey(bytes(16), os.urandom(16))], 0, [memory]) == [True]
    tier.unregister(memory)
    tier.close()
    tier.close()
    with pytest.raises(StorageError, match="closed"):
        tier.prefix(keys, 0)


def test_write_through_restart_and_tenants(store: Store) -> None:
    store.start_master()
    store.lend()
    alice, bob = spec_for(LAYOUT, cache_salt="alice"), spec_for(LAYOUT, cache_salt="bob")
    with engine_on(store.options, alice) as engine:
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
    with engine_on(store.options, alice, write="never", promote=True) as engine:
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
        engine.cache.check_integrity()
    with engine_on(store.options, bob) as engine:
        assert engine.lookup(tokens_of(3)) == 0
        assert check(engine, bob, tokens_of(3)) == 0


def test_an_engine_starts_and_ends_without_a_master(store: Store) -> None:
    spec = spec_for(LAYOUT)
    began = time.monotonic()
    engine = engine_on(store.options, spec, join=False)
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


def test_a_full_store_makes_room_and_the_engine_goes_on(store: Store) -> None:
    store.start_master()
    store.lend("16MiB")
    spec = spec_for(LAYOUT, layers=24, heads=8, head_size=64)  # 1.5 MiB in a chunk
    with engine_on(store.options, spec, size="16MiB", queue="64MiB") as engine:
        for seed in range(8):  # 48 MiB
            put(engine, spec, tokens_of(seed))
            assert engine.flush(60)
        found = counters(engine)
        assert found["storage_written"] + found["storage_rejected"] + found["storage_dropped"] >= 16
        assert found["storage_written"] > 10, "more than fits at a time"
        assert check(engine, spec, tokens_of(7)) > 0


def test_chunks_too_large_for_the_store_are_counted_and_harm_nobody(store: Store) -> None:
    store.start_master()
    store.lend("16MiB")
    spec = spec_for(LAYOUT, layers=48, heads=64, head_size=128)  # 24 MiB in a chunk
    with engine_on(store.options, spec, size="128MiB", queue="256MiB") as engine:
        put(engine, spec, tokens_of(1, 32))
        assert engine.flush(30)
        assert counters(engine)["storage_rejected"] == 2
        assert check(engine, spec, tokens_of(1, 32)) == 32, "from the pool"


def test_tenants_never_get_each_others_bytes(store: Store) -> None:
    store.start_master()
    store.lend()
    alice, bob = spec_for(LAYOUT, cache_salt="alice"), spec_for(LAYOUT, cache_salt="bob")
    prompts, foreign = [tokens_of(seed) for seed in range(4)], [tokens_of(seed) for seed in range(50, 54)]
    with engine_on(store.options, alice) as hers, engine_on(store.options, bob) as his:
        for prompt, other in zip(prompts, foreign, strict=True):
            put(hers, alice, prompt)
            put(his, bob, prompt, bytes_of=other)
            assert hers.flush(20)
            assert his.flush(20)
    # Pools are gone: all of it comes from the one store.
    with engine_on(store.options, alice, write="never") as hers, engine_on(store.options, bob, write="never") as his:
        for prompt, other in zip(prompts, foreign, strict=True):
            assert check(hers, alice, prompt) == 64
            assert check(his, bob, prompt, bytes_of=other) == 64


def test_metadata_over_http(store: Store) -> None:
    store.options["metadata"] = f"http://127.0.0.1:{free_port()}/metadata"
    store.start_master()
    store.lend("16MiB")
    spec = spec_for(LAYOUT)
    with engine_on(store.options, spec) as engine:
        put(engine, spec, tokens_of(1))
        assert engine.flush(20)
        assert counters(engine)["storage_written"] == 4
    with engine_on(store.options, spec, write="never") as engine:
        assert check(engine, spec, tokens_of(1)) == 64


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


def test_doctor_tries_the_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from vcache.cli import doctor

    config = VCacheConfig.from_env({}, storage={"kind": "mooncake", "options": store.options})

    def line() -> tuple[str, str, str]:
        check = list(doctor.mooncake(config))[-1]
        assert check.name == "Mooncake store"
        assert check.status == "ok" or (check.why and check.advice)
        return check.status, check.detail, check.advice

    status, detail, advice = line()
    assert (status, detail) == ("fail", f"no master answers at {store.parsed.master}")
    assert "vcache serve --with-mooncake" in advice
    master = store.start_master()
    status, detail, advice = line()
    assert status == "fail"
    assert "nobody lends memory" in detail
    assert "vcache lend-storage" in advice
    store.lend("16MiB")
    assert line()[:2] == ("ok", f"master at {store.parsed.master}: a put and a get work")
    monkeypatch.setattr(doctor, "_STORE_TIMEOUT", 1.0)
    assert master.pid is not None
    os.kill(master.pid, signal.SIGSTOP)
    try:
        status, detail, advice = line()
    finally:
        os.kill(master.pid, signal.SIGCONT)
    assert (status, "did not answer within 1 s" in detail, "restart what does not answer" in advice) == ("fail", True, True)


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

    report = bench_storage([32 * 2**20, 40 * 2**20], 1, lambda text: None)
    assert [(row["size"], row["operation"]) for row in report.rows] == [
        (size, operation) for size in ("32MiB", "40MiB") for operation in ("put", "get")
    ]
    assert all(row["low"] <= row["ratio"] <= row["high"] and row["raw"] > 0 for row in report.rows)


def test_the_benchmark_of_hits_sees_every_state(store: Store) -> None:
    from vcache.bench.storage_hits import bench_storage_hits

    report = bench_storage_hits(1, 5, lambda text: None)
    assert [row["state"].split()[0] for row in report.rows] == ["idle", "saturated", "busy", "master", "master"]
    assert all(row["with"] > 0 and row["without"] > 0 and row["ratio"] > 0 for row in report.rows)
