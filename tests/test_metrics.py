"""The engine's recorder: totals under threads, latencies, the warning about slow transfers, the Prometheus view."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from vcache.metrics import BUCKETS, COUNTERS, SLOW_BYTES, WARNING_INTERVAL, EngineMetrics


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def warnings() -> Iterator[list[logging.LogRecord]]:
    logger, recorder = logging.getLogger("vcache.metrics"), Recorder()
    logger.addHandler(recorder)
    yield recorder.records
    logger.removeHandler(recorder)


def test_a_new_recorder_shows_every_counter_at_zero() -> None:
    assert EngineMetrics().snapshot() == {"counters": dict.fromkeys(COUNTERS, 0), "hit_ratio": 0.0, "operations": {}}


def test_counters_add_up_and_new_names_appear() -> None:
    metrics = EngineMetrics()
    metrics.count("lookups", 4)
    metrics.count("hits", 3)
    metrics.count("misses")
    metrics.count("something_new", 2)
    stats = metrics.snapshot()
    assert stats["counters"]["lookups"] == 4
    assert stats["counters"]["misses"] == 1
    assert stats["counters"]["something_new"] == 2
    assert stats["hit_ratio"] == 0.75


def test_nothing_is_lost_between_threads() -> None:
    metrics = EngineMetrics()
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(2000):
            metrics.count("hits")
            metrics.observe("retrieve", "vram", 0.001, 1000)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = metrics.snapshot()
    assert stats["counters"]["hits"] == 8000
    assert stats["operations"]["retrieve"]["vram"]["calls"] == 8000
    assert stats["operations"]["retrieve"]["vram"]["bytes"] == 8_000_000


def test_operations_are_kept_apart_by_tier() -> None:
    metrics = EngineMetrics()
    metrics.observe("retrieve", "vram", 0.5, 10**9)
    metrics.observe("retrieve", "dram", 0.1, 10**9)
    metrics.observe("lookup", "", 0.002)
    operations = metrics.snapshot()["operations"]
    assert operations["retrieve"]["vram"]["gbps"] == pytest.approx(2.0)
    assert operations["retrieve"]["dram"]["gbps"] == pytest.approx(10.0)
    assert operations["lookup"]["all"]["gbps"] == 0.0
    assert operations["lookup"]["all"]["mean_ms"] == pytest.approx(2.0)


def test_bytes_of_an_operation_by_tier() -> None:
    metrics = EngineMetrics()
    for operation, tier, nbytes in (
        ("retrieve", "vram", 5),
        ("retrieve", "vram", 6),
        ("retrieve", "dram", 7),
        ("store", "vram", 8),
    ):
        metrics.observe(operation, tier, 0.1, nbytes)  # type: ignore[arg-type]
    metrics.observe("lookup", "", 0.1)
    assert metrics.bytes_by_tier("retrieve") == {"vram": 11, "dram": 7}
    assert metrics.bytes_by_tier("lookup") == {}, "the call as a whole has no tier"


def test_calls_that_move_nothing_do_not_dilute_the_rate() -> None:
    metrics = EngineMetrics()
    metrics.observe("retrieve", "vram", 9.0, 0)
    metrics.observe("retrieve", "vram", 1.0, 10**9)
    assert metrics.snapshot()["operations"]["retrieve"]["vram"]["gbps"] == pytest.approx(1.0)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1000), min_size=1, max_size=100))
def test_quantiles_lie_in_the_bucket_of_the_true_ones(durations: list[float]) -> None:
    metrics = EngineMetrics()
    for seconds in durations:
        metrics.observe("store", "vram", seconds)
    row = metrics.snapshot()["operations"]["store"]["vram"]
    assert min(durations) * 1e3 <= row["p50_ms"] * (1 + 1e-9) <= row["p99_ms"] * (1 + 1e-9) + 1e-12
    assert row["p99_ms"] <= row["max_ms"] == max(durations) * 1e3
    true = sorted(durations)[-(-len(durations) // 2) - 1]
    bounds = [0.0, *BUCKETS, float("inf")]
    index = next(i for i, bound in enumerate(bounds[1:]) if true <= bound)
    assert bounds[index] * 1e3 <= row["p50_ms"] * (1 + 1e-9) + 1e-12
    assert row["p50_ms"] <= bounds[index + 1] * 1e3 * (1 + 1e-9)


def test_a_snapshot_is_a_copy() -> None:
    metrics = EngineMetrics()
    before = metrics.snapshot()
    before["counters"]["hits"] = 99
    metrics.count("misses")
    assert metrics.snapshot()["counters"]["hits"] == 0
    assert before["counters"]["misses"] == 0


def test_a_slow_transfer_is_reported_with_its_rate_and_floor(warnings: list[logging.LogRecord]) -> None:
    EngineMetrics(Clock(), floor_gbps=10).observe("retrieve", "vram", 1.0, 10**9)
    (record,) = warnings
    assert record.levelno == logging.WARNING
    assert "retrieve over tier vram ran at 1.00 GB/s, below the floor of 10 GB/s" in record.getMessage()
    assert "vcache doctor" in record.getMessage()


@pytest.mark.parametrize(
    ("floor", "seconds", "nbytes"),
    [
        (0.0, 1.0, 10**9),  # no floor
        (1.0, 1.0, 10**9),  # exactly on it
        (100.0, 1.0, SLOW_BYTES - 1),  # too small to judge
        (100.0, 0.0, SLOW_BYTES),  # the clock did not move
    ],
)
def test_other_transfers_are_not_reported(warnings: list[logging.LogRecord], floor: float, seconds: float, nbytes: int) -> None:
    metrics = EngineMetrics(Clock(), floor_gbps=floor)
    metrics.observe("store", "dram", seconds, nbytes)
    assert not warnings
    assert metrics.snapshot()["operations"]["store"]["dram"]["slow"] == 0


def test_warnings_come_at_most_once_a_minute_for_each_path_and_are_counted(warnings: list[logging.LogRecord]) -> None:
    clock = Clock()
    metrics = EngineMetrics(clock, floor_gbps=10)
    for _ in range(3):
        metrics.observe("retrieve", "vram", 1.0, 10**9)
    metrics.observe("retrieve", "dram", 1.0, 10**9)
    assert len(warnings) == 2
    clock.now += WARNING_INTERVAL
    metrics.observe("retrieve", "vram", 1.0, 10**9)
    assert len(warnings) == 3
    assert vars(warnings[-1])["slow_transfers"] == 4
    assert metrics.snapshot()["operations"]["retrieve"]["vram"]["slow"] == 4


def test_prometheus_shows_what_the_snapshot_shows() -> None:
    metrics = EngineMetrics()
    metrics.count("hits", 3)
    metrics.observe("retrieve", "vram", 3e-5, 4096)
    metrics.observe("retrieve", "vram", 1e9)
    registry = CollectorRegistry()
    registry.register(metrics.collector(engine="0"))
    text = generate_latest(registry).decode()
    assert 'vcache_engine_hits_total{engine="0"} 3.0' in text
    assert 'vcache_engine_moved_bytes_total{engine="0",operation="retrieve",tier="vram"} 4096.0' in text
    where = 'engine="0",operation="retrieve",tier="vram"'
    sample = registry.get_sample_value
    labels = {"engine": "0", "operation": "retrieve", "tier": "vram"}
    assert sample("vcache_engine_seconds_bucket", {**labels, "le": str(BUCKETS[1])}) == 0
    assert sample("vcache_engine_seconds_bucket", {**labels, "le": str(BUCKETS[2])}) == 1
    assert sample("vcache_engine_seconds_bucket", {**labels, "le": "+Inf"}) == 2
    assert f"vcache_engine_seconds_count{{{where}}} 2.0" in text


def test_two_recorders_live_side_by_side() -> None:
    registry = CollectorRegistry()
    one, two = EngineMetrics(), EngineMetrics()
    registry.register(one.collector())
    one.count("hits")
    assert two.snapshot()["counters"]["hits"] == 0
    assert registry.get_sample_value("vcache_engine_hits_total") == 1
