"""Blocks that must not be reused while they are copied: references held in vLLM's block pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

MAX_SHARE = 0.25
"""While saves withhold this part of the engine's blocks from it, no further save begins."""


class BlockRefs:
    """Holds references to blocks, by save job. Used by the scheduler's thread only."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._held: dict[int, list[Any]] = {}
        self._count = 0
        """References held: at least as many as blocks that nobody else refers to."""

    def bind(self, pool: Any) -> None:
        """Say whose blocks they are: `pool` is vLLM's `BlockPool`."""
        self._pool = pool

    @property
    def bound(self) -> bool:
        return self._pool is not None

    def __bool__(self) -> bool:
        return bool(self._held)

    def room(self) -> bool:
        """Whether another save may begin, of blocks that its running request refers to as well.

        Such blocks cost the engine nothing, however many they are. They are withheld from it when the request ends, or is
        preempted, before its saves do: that is what is limited. Constant time, unless many blocks are held.
        """
        if not self.bound:
            return True
        limit = int(MAX_SHARE * len(self._pool.blocks))
        return self._count < limit or self._withheld() < limit

    def hold(self, job: int, blocks: Sequence[int]) -> None:
        """Keep these blocks from being reused until `release(job)`. They must be in use, or cached."""
        held = [self._pool.blocks[block] for block in blocks]
        self._pool.touch(held)
        self._held[job] = held
        self._count += len(held)

    def release(self, job: int) -> None:
        """Let go of the blocks of a job. Idempotent."""
        held = self._held.pop(job, None)
        if held is not None:
            self._count -= len(held)
            self._pool.free_blocks(reversed(held))

    def only_holder(self) -> bool:
        """Whether the end of a save will make blocks free: nobody else refers to them."""
        return any(block.ref_cnt == 1 for held in self._held.values() for block in held)

    def _withheld(self) -> int:
        """Blocks that would be free if no save held them."""
        # Two requests with one prefix may save the same block.
        references = Counter(block.block_id for held in self._held.values() for block in held)
        return sum(self._pool.blocks[block].ref_cnt == count for block, count in references.items())
