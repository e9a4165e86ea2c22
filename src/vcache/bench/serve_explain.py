"""Where the time to first token went, and from where the tokens came, by what the servers count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .serve_counters import Counted

TIERS = ("vram", "dram", "storage", "remote")
"""From where a connector loads. `remote`: memory of other hosts."""
EXPLAINED = (
    "queue_mean_ms",
    "prefill_mean_ms",
    "decode_mean_ms",
    "server_ttft_mean_ms",
    "steps",
    "tokens_a_step",
    "computed_tokens",
    *(f"loaded_{tier}_gb" for tier in TIERS),
    *(f"loaded_{tier}_tokens" for tier in TIERS),
    "loads",
    "load_mean_ms",
    "lookup_mean_ms",
    "admission_mean_ms",
)
"""Keys of `numbers`, besides the servers' own names."""


def numbers(counted: Counted | None) -> dict[str, float | None]:
    """`EXPLAINED`, each None where the servers do not count it; and all of `Counted.named` as it is. Pure.

    Queue: from a request's arrival in the engine to its first step, with the wait for a load. Prefill: from there to the first
    token. Tokens by tier: the connector's hits, divided like its bytes.
    """
    if counted is None:
        return dict.fromkeys(EXPLAINED)
    named = counted.named

    def mean(seconds: str, count: str) -> float | None:
        return 1e3 * named[seconds] / named[count] if named.get(count) and seconds in named else None

    def histogram(name: str) -> float | None:
        return mean(f"{name}_sum", f"{name}_count")

    found: dict[str, float | None] = {
        "queue_mean_ms": histogram("request_queue_time_seconds"),
        "prefill_mean_ms": histogram("request_prefill_time_seconds"),
        "decode_mean_ms": histogram("request_decode_time_seconds"),
        "server_ttft_mean_ms": histogram("time_to_first_token_seconds"),
        "steps": named.get("iteration_tokens_total_count"),
        "tokens_a_step": None,
        "computed_tokens": None,
        "loads": named.get("vcache_loads"),
        "load_mean_ms": mean("vcache_load_seconds", "vcache_loads"),
        "lookup_mean_ms": mean("vcache_lookup_seconds", "vcache_lookups"),
        "admission_mean_ms": mean("vcache_admission_seconds", "vcache_admissions"),
    }
    if found["steps"]:
        found["tokens_a_step"] = named["iteration_tokens_total_sum"] / found["steps"]
    if counted.queried is not None and counted.own is not None:
        found["computed_tokens"] = counted.queried - counted.own - (counted.connector or 0.0)
    by_tier = _bytes_by_tier(counted)
    whole = sum(by_tier.values())
    for tier in TIERS:
        nbytes = by_tier.get(tier)
        found[f"loaded_{tier}_gb"] = None if nbytes is None else nbytes / 1e9
        has_tokens = nbytes is not None and counted.connector is not None
        found[f"loaded_{tier}_tokens"] = counted.connector * nbytes / whole if has_tokens and whole else None  # type: ignore[operator]
    return {**found, **named}


def sources(row: Mapping[str, Any]) -> str:
    """One line on a way: where its prompts came from; empty where nobody counts that. Pure."""
    if not row.get("queried_tokens") or row.get("computed_tokens") is None:
        return ""
    found = [("own cache", row["own_hit_tokens"]), ("connector", row.get("connector_hit_tokens") or 0.0)]
    found.append(("computed", row["computed_tokens"]))
    text = f"{row['way']}, prompt tokens: " + ", ".join(f"{name} {tokens / 1e3:,.0f}k" for name, tokens in found)
    tiers = [f"{tier} {row[f'loaded_{tier}_gb']:,.1f}" for tier in TIERS if row.get(f"loaded_{tier}_gb")]
    return text + ("; GB loaded: " + ", ".join(tiers) if tiers else "")


def times(row: Mapping[str, Any]) -> str:
    """One line on a way: what its mean time to first token is made of; empty where nobody counts that. Pure."""

    def told(key: str, text: str) -> list[str]:
        return [] if row.get(key) is None else [text.format(**row)]

    parts = [
        *told("server_ttft_mean_ms", "TTFT in the server {server_ttft_mean_ms:,.0f} ms"),
        *told("queue_mean_ms", "queue {queue_mean_ms:,.0f}"),
        *told("prefill_mean_ms", "prefill {prefill_mean_ms:,.0f}"),
        *told("admission_mean_ms", "blocks for a load after {admission_mean_ms:,.0f}"),
        *told("load_mean_ms", "{loads:,.0f} loads of {load_mean_ms:,.1f} ms"),
        *told("lookup_mean_ms", "look-ups of {lookup_mean_ms:,.2f} ms"),
        *told("tokens_a_step", "{steps:,.0f} steps of {tokens_a_step:,.0f} tokens"),
    ]
    return f"{row['way']}, means: " + ", ".join(parts) if parts else ""


def _bytes_by_tier(counted: Counted) -> dict[str, float]:
    """Only tiers that are counted."""
    found = {tier: counted.named[name] for tier in TIERS if (name := f"vcache_load_bytes_{tier}") in counted.named}
    if not found and counted.loaded_bytes is not None and any(name.startswith("kv_offload_") for name in counted.named):
        return {"dram": counted.loaded_bytes}  # vLLM's own offloading has no other here
    return found
