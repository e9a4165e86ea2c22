"""Counters of the connector in vLLM's own statistics and Prometheus metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "lookups": "Look-ups by the scheduler.",
    "lookup_seconds": "Time the scheduler spent in them.",
    "queried_tokens": "Prompt tokens asked for, beyond what the engine had itself.",
    "hit_tokens": "Of these, tokens that the pool had.",
    "loads": "Loads that ended, by worker.",
    "load_tokens": "Tokens loaded and verified.",
    "load_bytes": "Bytes of them.",
    "load_bytes_vram": "Bytes read for loads from VRAM of this host, by worker, also where a load failed in the end.",
    "load_bytes_dram": "The same from host memory of this host.",
    "load_bytes_storage": "The same from the storage tier.",
    "load_bytes_remote": "The same from memory of other hosts.",
    "load_seconds": "Time from the start of a load until it was seen to have ended, summed up.",
    "load_waits": "Loads that waited more than a millisecond for a step before theirs.",
    "load_failures": "Loads of which at least one chunk failed; its tokens were recomputed.",
    "admissions": "Requests with a load, when vLLM gave them blocks.",
    "admission_seconds": "Time from their arrival until then, summed up.",
    "errors": "Loads and saves that ended in an error, of whatever kind; they count as failed or dropped, too.",
    "saves": "Saves that ended, by worker.",
    "save_bytes": "Bytes written.",
    "save_seconds": "Time that the bytes took to move, without waiting for the forward pass, summed up.",
    "save_drops": "Saves given up: no room, too many blocks held, or computed from a failed load.",
}
"""Name -> meaning. Prometheus: `vllm:vcache_<name>` (counters, label `engine` as vLLM adds it)."""


class VCacheStats(KVConnectorStats):  # type: ignore[misc]
    """Sums since the last report. Not thread-safe."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or dict.fromkeys(COUNTERS, 0))

    def add(self, name: str, amount: float = 1) -> None:
        """Add to one of `COUNTERS`."""
        self.data[name] = self.data.get(name, 0) + amount

    def reset(self) -> None:
        self.data = dict[str, Any](dict.fromkeys(COUNTERS, 0))

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> VCacheStats:
        for name, amount in other.data.items():
            self.add(name, amount)
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM logs: hit ratio and rates of the interval beside the sums that are not 0."""
        found: dict[str, int | float] = {name: round(value, 4) for name, value in self.data.items() if value}
        for what in ("load", "save"):
            if self.data.get(f"{what}_seconds"):
                found[f"{what}_gbps"] = round(self.data[f"{what}_bytes"] / self.data[f"{what}_seconds"] / 1e9, 3)
        if self.data.get("queried_tokens"):
            found["hit_ratio"] = round(self.data["hit_tokens"] / self.data["queried_tokens"], 4)
        return found


class VCachePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """One counter for each name in `COUNTERS`, and each engine."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine: Mapping[int, list[object]]
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, meaning in COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:vcache_{name}", documentation=meaning, labelnames=labelnames)
            self._counters[name] = {engine: counter.labels(*values) for engine, values in per_engine.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, amount in transfer_stats_data.items():
            if amount and name in self._counters:
                self._counters[name][engine_idx].inc(amount)
