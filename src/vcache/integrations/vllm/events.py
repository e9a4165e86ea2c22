"""KV cache events: what this instance stored in the pool, for routers that follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MEDIUM = "VCACHE"


class EventLog:
    """Collects events until vLLM takes them. What others evict from the pool is not known here: routers should age entries."""

    def __init__(self, enabled: bool, block_size: int) -> None:
        """`block_size`: tokens that one block hash covers."""
        self._enabled = enabled
        self._block_size = block_size
        self._events: list[Any] = []

    def stored(self, request: Any, start: int, end: int) -> None:
        """Note that blocks `[start, end)` of a request (in units of `block_size`) can now be loaded by every instance."""
        if not self._enabled:
            return
        from vllm.distributed.kv_events import BlockStored
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

        hashes: Sequence[bytes] = request.block_hashes
        lora = getattr(request, "lora_request", None)
        tokens = request.all_token_ids[start * self._block_size : end * self._block_size]
        self._events.append(
            BlockStored(
                block_hashes=[maybe_convert_block_hash(each) for each in hashes[start:end]],
                parent_block_hash=maybe_convert_block_hash(hashes[start - 1]) if start else None,
                token_ids=list(tokens),
                block_size=self._block_size,
                lora_id=lora.adapter_id if lora else None,
                medium=MEDIUM,
                lora_name=lora.name if lora else None,
            )
        )

    def cleared(self) -> None:
        """Note that the pool forgot everything of this model."""
        if self._enabled:
            from vllm.distributed.kv_events import AllBlocksCleared

            self._events.append(AllBlocksCleared())

    def take(self) -> list[Any]:
        """Take the events since the last call."""
        events, self._events = self._events, []
        return events
