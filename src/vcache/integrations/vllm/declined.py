"""A worker that shares nothing. The scheduler's side may have decided otherwise, and waits for answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .metadata import LoadOutcome, SaveOutcome, VCacheMetadata, VCacheWorkerMetadata

if TYPE_CHECKING:
    import torch

    from .stats import VCacheStats

logger = logging.getLogger("vllm.vcache")


class DeclinedWorker:
    """Refuses whatever is offered, in place of a `WorkerSide`, and says once that there is no use in offering more."""

    def __init__(self, reason: str, *, late: bool = True) -> None:
        """`late`: as in `WorkerSide`."""
        self._reason = reason
        self._late = late
        self._asked = False
        self._report = VCacheWorkerMetadata()
        self._loaded: set[str] = set()
        self._bad_blocks: set[int] = set()

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Do nothing."""

    def unregister(self) -> None:
        """Do nothing."""

    def begin_step(self, metadata: VCacheMetadata) -> None:
        """Refuse all of them: their blocks hold nothing that counts."""
        if metadata.step and not self._asked:  # a scheduler's side that declines as well counts no steps
            self._asked = True
            self._report.off = 1
            logger.warning("VCache does not share the KV cache of this model: %s. Every look-up is a miss.", self._reason)
        for job in metadata.loads:
            self._report.loads[job.job] = LoadOutcome(1, 0)
            self._bad_blocks.update(job.blocks)
            if job.blocking:
                self._report.failed_step = metadata.step
            elif not self._late:
                self._loaded.add(job.request)

    def load_within(self, metadata: VCacheMetadata) -> None:
        """Do nothing: they are refused."""

    def start_saves(self, metadata: VCacheMetadata) -> None:
        """Refuse all of them."""
        self._report.saves |= {job.job: SaveOutcome(1, False, True) for job in metadata.saves}

    def finished(self, *, idle: bool = False) -> set[str]:
        """Take the requests whose load was refused since the last call, unless reports tell of them."""
        loaded, self._loaded = self._loaded, set()
        return loaded

    def bad_blocks(self) -> set[int]:
        """Take the blocks that were to be loaded since the last call."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def report(self) -> VCacheWorkerMetadata | None:
        """Take what the scheduler's side has to hear since the last call; None when there is nothing to say."""
        report, self._report = self._report, VCacheWorkerMetadata()
        return report or None

    def take_stats(self) -> VCacheStats | None:
        """Return None: nothing is counted."""
        return None

    def close(self) -> None:
        """Do nothing."""
