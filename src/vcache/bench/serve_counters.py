"""What vLLM servers count about their caches, as `/metrics` tells it, and what a run added to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from .serve_client import Endpoint, RefusedError, get

SETTLE = 5.0
"""Seconds within which the counters of finished requests must have arrived."""
_PAUSE = 0.25


class Counted(NamedTuple):
    """Tokens and bytes; None: the server does not count it."""

    queried: float | None
    """Prompt tokens that a cache was asked for."""
    own: float | None
    """Of these, found in the instance's own prefix cache."""
    connector: float | None
    """Of these, found through the KV connector."""
    loaded_bytes: float | None
    """Read through the connector."""
    stored_bytes: float | None
    """Written through the connector."""
    named: Mapping[str, float] = {}
    """Other sums by name: all that the connectors count, and what requests and steps took (`KEPT`); without those not there."""

    def since(self, before: Counted) -> Counted:
        """What was added since `before`."""
        pairs = zip(self[:-1], before[:-1], strict=True)
        sums = (None if now is None else now - (then or 0.0) for now, then in pairs)
        named = {name: now - before.named.get(name, 0.0) for name, now in self.named.items()}
        return Counted._make([*sums, named])

    @property
    def hit_ratio(self) -> float | None:
        """Share of the queried tokens that were found, by either."""
        if not self.queried or self.own is None:
            return None
        return (self.own + (self.connector or 0.0)) / self.queried


_SERIES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("vllm:prefix_cache_queries_total", ""),),
    (("vllm:prefix_cache_hits_total", ""),),
    (("vllm:external_prefix_cache_hits_total", ""),),
    (
        ("vllm:vcache_load_bytes_total", ""),
        ("vllm:kv_offload_load_bytes_total", ""),
        ("vllm:kv_offload_total_bytes_total", "CPU_to_GPU"),
    ),
    (
        ("vllm:vcache_save_bytes_total", ""),
        ("vllm:kv_offload_store_bytes_total", ""),
        ("vllm:kv_offload_total_bytes_total", "GPU_to_CPU"),
    ),
)
"""For each field of `Counted`, names of the counter, and its `transfer_type` where it has one. The first one there counts."""

_REQUEST = ("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds")
_HISTOGRAMS = (*_REQUEST, "time_to_first_token_seconds", "iteration_tokens_total")
KEPT = ("vllm:num_preemptions_total", *(f"vllm:{name}_{part}" for name in _HISTOGRAMS for part in ("sum", "count")))
"""Series of `Counted.named` beside the connectors'."""
_CONNECTORS = ("vllm:vcache_", "vllm:kv_offload_", "vllm:lmcache")
_SUMS = ("_total", "_sum", "_count")


def parse(text: str) -> Counted:
    """Read Prometheus text, summed over labels. Raises `ValueError` when it is none. Pure."""
    sums: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series = sample.name, sample.labels.get("transfer_type", "")
            sums[series] = sums.get(series, 0.0) + sample.value
    named: dict[str, float] = {}
    for (name, kind), value in sums.items():
        if name in KEPT or (name.startswith(_CONNECTORS) and name.endswith(_SUMS)):
            short = "_".join(filter(None, (name.removeprefix("vllm:").removesuffix("_total"), kind)))
            named[short] = named.get(short, 0.0) + value
    fields = (next((sums[series] for series in names if series in sums), None) for names in _SERIES)
    return Counted._make([*fields, named])


async def read(endpoints: Sequence[Endpoint]) -> Counted | None:
    """Sum over all servers; None if one of them has no `/metrics`. Raises `ServerError` when one is gone."""
    found = []
    for endpoint in endpoints:
        try:
            found.append(parse(await get(endpoint, "/metrics")))
        except (RefusedError, ValueError):
            return None
    named: dict[str, float] = {}
    for each in found:
        for name, value in each.named.items():
            named[name] = named.get(name, 0.0) + value
    sums = (None if None in values else sum(values) for values in zip(*(each[:-1] for each in found), strict=True))
    return Counted._make([*sums, named])


async def read_settled(endpoints: Sequence[Endpoint]) -> Counted | None:
    """The same once they stand still, or after `SETTLE` seconds: counters follow an answer within moments."""
    deadline = time.monotonic() + SETTLE
    last = await read(endpoints)
    while last is not None and time.monotonic() < deadline:
        await asyncio.sleep(_PAUSE)
        now = await read(endpoints)
        if now == last:
            break
        last = now
    return last
