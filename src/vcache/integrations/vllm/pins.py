"""Blocks that must not be reused while they are copied: references held in vLLM's block pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_SHARE = 0.25
"""Saves may hold at most this part of the engine's blocks; beyond it they are dropped."""


class BlockPins:
    """References to blocks by save job. Used by the scheduler's thread only."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._held: dict[int, list[Any]] = {}
        self._count = 0

    def bind(self, pool: Any) -> None:
        """`pool`: vLLM's `BlockPool`."""
        self._pool = pool

    @property
    def bound(self) -> bool:
        return self._pool is not None

    def __bool__(self) -> bool:
        return bool(self._held)

    def room(self) -> int:
        """How many more blocks may be held."""
        return int(MAX_SHARE * len(self._pool.blocks)) - self._count if self.bound else 2**31

    def hold(self, job: int, blocks: Sequence[int]) -> None:
        """Keep these blocks from being reused until `release(job)`. They must be in use, or cached."""
        held = [self._pool.blocks[block] for block in blocks]
        self._pool.touch(held)
        self._held[job] = held
        self._count += len(held)

    def release(self, job: int) -> None:
        """Idempotent."""
        held = self._held.pop(job, None)
        if held is not None:
            self._count -= len(held)
            self._pool.free_blocks(reversed(held))

    def only_holder(self) -> bool:
        """Whether the end of a save will make blocks free: nobody else refers to them."""
        return any(block.ref_cnt == 1 for held in self._held.values() for block in held)
