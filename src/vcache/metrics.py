"""What an engine counts: a thread-safe recorder, its snapshot for `get_stats`, and an optional Prometheus collector.

There is no global registry: a process that wants `/metrics` registers `EngineMetrics.collector()` where it likes.
"""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from prometheus_client import Metric
    from prometheus_client.registry import Collector

    from .segment.slots import Tier

    Source = Tier | Literal["remote", ""]
    """Where bytes come from or go to. `remote`: memory of another host, whichever tier it is there; `""`: all together."""

Operation = Literal["lookup", "store", "retrieve", "demote", "promote", "spill"]

COUNTERS = {
    "lookups": "Chunks asked for by look-ups and retrieves (= hits + misses + errors).",
    "hits": "Chunks found by them.",
    "misses": "Chunks not found, stale or not readable in time.",
    "errors": "Chunks whose look-up failed because a tier or the manager did.",
    "store_chunks": "Chunks written to VRAM or DRAM with their headers.",
    "store_tokens": "Tokens in them.",
    "retrieve_chunks": "Chunks read and verified.",
    "retrieve_tokens": "Tokens delivered from them.",
    "stale_reads": "Reads thrown away because the slot header was not the one promised.",
    "checksum_failures": "Chunks in VRAM or DRAM whose header was right and whose checksum was not: misses.",
    "put_exists": "Chunks not written because they were there.",
    "put_busy": "Chunks not written because another client was writing them.",
    "put_no_space": "Chunks not written because the pool had no room.",
    "slab_headers_mended": "Slab headers that were damaged in memory and kept every writer away.",
    "put_lapsed": "Chunks written but not published: the ticket had lapsed or the manager was gone.",
    "unreachable": "Slots that this process could not map.",
    "transfer_errors": "Transfers that could not be started.",
    "manager_errors": "Calls to the manager that failed.",
    "remote_errors": "Reads from memory of other hosts that failed or ran into their deadline.",
    "remote_stale": "Chunks read from other hosts and thrown away because the slot header was not the one promised.",
    "remote_bypassed": "Chunks on other hosts that were not read, because reads from their lender failed just before.",
    "storage_written": "Chunks written to the storage tier.",
    "storage_dropped": "Background writes to the storage tier dropped because its queue was full or at shutdown.",
    "storage_errors": "Calls to the storage tier that failed.",
    "storage_rejected": "Chunks that the storage tier did not take: it is full.",
    "storage_unreadable": "Chunks that the storage tier said it has, and then did not deliver (dead owner, just evicted).",
    "storage_invalid": "Values in the storage tier that are not what their key says, or of another format; removed.",
    "storage_damaged": "Values in the storage tier whose checksum was wrong: misses; removed, so that they are written again.",
    "storage_busy": "Reads from the storage tier given up: earlier ones kept all buffers until the deadline.",
    "storage_promoted": "Chunks read from the storage tier and put into the pool.",
    "demoted_chunks": "Chunks moved from VRAM to host memory, because VRAM ran full.",
    "demote_refused": "Chunks that were to be moved and stayed: in use again, overwritten, or out of reach.",
    "promoted_chunks": "Chunks moved from host memory to VRAM, because they were read again and VRAM had room.",
    "promote_refused": "Chunks that were to be moved up and stayed: in use, overwritten, or out of reach.",
    "spilled_chunks": "Chunks written to the storage tier before they were evicted.",
    "spill_skipped": "Chunks that were to be written before eviction and were not: overwritten, too large, or not taken.",
    "spill_errors": "Times that the storage tier failed while chunks were written before eviction.",
}
"""Counters that are always present (at 0 at first). Others may be counted too; they appear once counted."""

BUCKETS = tuple(10e-6 * 2**power for power in range(24))
"""Upper bounds of the latency buckets in seconds, 10 microseconds to 84 seconds, doubling."""

SLOW_BYTES = 16 * 2**20
"""Transfers below this size are not judged by `floor_gbps`: latency dominates them."""
WARNING_INTERVAL = 60.0
"""Seconds between two warnings about the same operation and tier."""

_log = logging.getLogger("vcache.metrics")


class _Latency:
    """Calls of one operation on one tier. Guarded by the recorder's lock."""

    __slots__ = ("buckets", "calls", "longest", "nbytes", "next_warning", "seconds", "shortest", "slow", "transfer_seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.calls = 0
        self.seconds = 0.0
        self.shortest = float("inf")
        self.longest = 0.0
        self.nbytes = 0
        self.transfer_seconds = 0.0
        self.slow = 0
        self.next_warning = float("-inf")

    def add(self, seconds: float, nbytes: int) -> None:
        self.buckets[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.calls += 1
        self.seconds += seconds
        self.shortest = min(self.shortest, seconds)
        self.longest = max(self.longest, seconds)
        if nbytes:
            self.nbytes += nbytes
            self.transfer_seconds += seconds

    def quantile(self, share: float) -> float:
        """Seconds, interpolated within a bucket (so within a factor of two of the truth); 0 without calls."""
        rank, seen = share * self.calls, 0
        for index, count in enumerate(self.buckets):
            if count and seen + count >= rank:
                low = BUCKETS[index - 1] if index else 0.0
                high = BUCKETS[index] if index < len(BUCKETS) else self.longest
                estimate = low + (high - low) * (rank - seen) / count
                return min(max(estimate, self.shortest), self.longest)
            seen += count
        return 0.0

    def snapshot(self) -> dict[str, float]:
        return {
            "calls": self.calls,
            "seconds": self.seconds,
            "bytes": self.nbytes,
            "gbps": self.nbytes / self.transfer_seconds / 1e9 if self.transfer_seconds else 0.0,
            "slow": self.slow,
            "mean_ms": 1e3 * self.seconds / self.calls if self.calls else 0.0,
            "p50_ms": 1e3 * self.quantile(0.5),
            "p99_ms": 1e3 * self.quantile(0.99),
            "max_ms": 1e3 * self.longest,
        }


class EngineMetrics:
    """Counters, and latencies per operation and tier. Thread-safe; no call blocks for longer than another one's update."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, *, floor_gbps: float = 0.0) -> None:
        """`clock` gives seconds. `floor_gbps`: warn when a transfer of 16 MiB or more runs below it; 0 = never."""
        self._clock = clock
        self._floor = floor_gbps
        self._lock = threading.Lock()
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._latencies: dict[tuple[Operation, Source], _Latency] = {}

    def count(self, name: str, amount: int = 1) -> None:
        """Add `amount` (not negative) to counter `name`: one of `COUNTERS`, or a new one in `snake_case`."""
        with self._lock:
            self._counters[name] = self._counters.get(name, 0) + amount

    def observe(self, operation: Operation, tier: Source, seconds: float, nbytes: int = 0) -> None:
        """Record one call that took `seconds`. `tier` `""`: the call as a whole, over all tiers. `nbytes`: payload moved."""
        with self._lock:
            latency = self._latencies.setdefault((operation, tier), _Latency())
            latency.add(seconds, nbytes)
            slow = nbytes >= SLOW_BYTES and seconds > 0 and nbytes < self._floor * 1e9 * seconds
            if slow:
                latency.slow += 1
            warn = slow and self._clock() >= latency.next_warning
            if warn:
                latency.next_warning = self._clock() + WARNING_INTERVAL
            times = latency.slow
        if warn:
            _log.warning(
                "slow transfer: %s over tier %s ran at %.2f GB/s, below the floor of %g GB/s; "
                "run `vcache doctor` to see which links and fast paths are in use",
                operation,
                tier or "all",
                nbytes / seconds / 1e9,
                self._floor,
                extra={"nbytes": nbytes, "seconds": seconds, "slow_transfers": times},
            )

    def bytes_by_tier(self, operation: Operation) -> dict[str, int]:
        """Bytes that one operation has moved so far, by tier. Cheaper than `snapshot`."""
        with self._lock:
            return {tier: latency.nbytes for (name, tier), latency in self._latencies.items() if name == operation and tier}

    def snapshot(self) -> dict[str, Any]:
        """`counters`: name -> int. `hit_ratio`: hits / lookups (0 without look-ups). `operations`: operation -> tier (`all` =
        the call as a whole) -> calls, seconds, bytes, gbps, slow, mean_ms, p50_ms, p99_ms, max_ms. A copy; consistent."""
        with self._lock:
            counters = dict(self._counters)
            operations: dict[str, dict[str, dict[str, float]]] = {}
            for (operation, tier), latency in sorted(self._latencies.items()):
                operations.setdefault(operation, {})[tier or "all"] = latency.snapshot()
        ratio = counters["hits"] / counters["lookups"] if counters["lookups"] else 0.0
        return {"counters": counters, "hit_ratio": ratio, "operations": operations}

    def collector(self, **labels: str) -> Collector:
        """A Prometheus collector of `vcache_engine_*`, reading this recorder at each scrape. `labels` go on every sample.

        Needs `prometheus_client`; register it as `registry.register(metrics.collector(engine="0"))`.
        """
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
        from prometheus_client.registry import Collector

        recorder, names, values = self, list(labels), list(labels.values())

        class EngineCollector(Collector):
            def collect(self) -> Iterator[Metric]:
                with recorder._lock:
                    counters = dict(recorder._counters)
                    rows = [
                        (operation, tier or "all", list(latency.buckets), latency.seconds, latency.nbytes, latency.slow)
                        for (operation, tier), latency in sorted(recorder._latencies.items())
                    ]
                for name, value in counters.items():
                    family = CounterMetricFamily(f"vcache_engine_{name}", COUNTERS.get(name, name), labels=names)
                    family.add_metric(values, value)
                    yield family
                where = [*names, "operation", "tier"]
                seconds = HistogramMetricFamily("vcache_engine_seconds", "Duration of calls, in seconds.", labels=where)
                moved = CounterMetricFamily("vcache_engine_moved_bytes", "Payload bytes moved.", labels=where)
                slow = CounterMetricFamily(
                    "vcache_engine_slow_transfers", "Transfers of 16 MiB or more below transfer.floor_gbps.", labels=where
                )
                for operation, tier, buckets, total, nbytes, slow_calls in rows:
                    sums, seen = [], 0
                    for bound, count in zip([*map(str, BUCKETS), "+Inf"], buckets, strict=True):
                        seen += count
                        sums.append((bound, float(seen)))
                    seconds.add_metric([*values, operation, tier], buckets=sums, sum_value=total)
                    moved.add_metric([*values, operation, tier], nbytes)
                    slow.add_metric([*values, operation, tier], slow_calls)
                yield from (seconds, moved, slow)

        return EngineCollector()
