"""Differences between vLLM versions, told by what is there; by version number only what no look at it can tell."""

from __future__ import annotations

import logging
import re
from typing import Any

import vllm

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # vLLM 0.26
    CacheHitSource = None

__all__ = ["CacheHitSource", "late_reports", "peer_source", "safe_sync_budget"]

logger = logging.getLogger("vllm.vcache")

SYNC_BUDGET = 16 * 2**20
LATE_SINCE, LATE_UNTIL = (0, 26), (0, 34)
"""vLLM versions, the first and the one behind the last, whose scheduler was seen to read `finished_recving` behind
`update_connector_output`, and what workers report only when the GPU has finished the step."""


def peer_source() -> Any:
    """Say how vLLM's metrics call tokens that come from the pool; None where they do not ask."""
    return CacheHitSource.P2P if CacheHitSource is not None else None


def late_reports(version: str = vllm.__version__) -> bool:
    """Whether a worker's report may say what landed after it was made, and say it in place of `get_finished`. Pure."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and LATE_SINCE <= (int(numbers[1]), int(numbers[2])) < LATE_UNTIL


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
