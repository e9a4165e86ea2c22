"""Differences between vLLM versions, told by what is there, not by version numbers."""

from __future__ import annotations

import logging
from typing import Any

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # vLLM 0.26
    CacheHitSource = None

__all__ = ["CacheHitSource", "peer_source", "safe_sync_budget"]

logger = logging.getLogger("vllm.vcache")

SYNC_BUDGET = 16 * 2**20


def peer_source() -> Any:
    """Say how vLLM's metrics call tokens that come from the pool; None where they do not ask."""
    return CacheHitSource.P2P if CacheHitSource is not None else None


def safe_sync_budget(vllm_config: Any, workers: int, wanted: int | None) -> int:
    """Decide how many bytes may be loaded inside a step.

    A failed load inside a step is found out after the step's tokens were computed from it. vLLM takes those back on one worker
    with the V1 runner and without asynchronous scheduling; elsewhere every load runs beside the steps.
    """
    reasons = []
    if workers > 1:
        reasons.append(f"{workers} workers")
    if getattr(vllm_config, "use_v2_model_runner", False):
        reasons.append("the V2 model runner")
    if getattr(vllm_config.scheduler_config, "async_scheduling", False):
        reasons.append("asynchronous scheduling")
    if not reasons:
        return SYNC_BUDGET if wanted is None else wanted
    if wanted:
        logger.warning(
            "sync_load_budget is ignored: with %s, vLLM cannot take back a failed synchronous load", ", ".join(reasons)
        )
    return 0
