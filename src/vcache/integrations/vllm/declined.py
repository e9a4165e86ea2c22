"""A worker that shares nothing. The scheduler's side may have decided otherwise, and waits for answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .metadata import LoadOutcome, SaveOutcome, VCacheMetadata, VCacheWorkerMetadata
from .worker import Finished

if TYPE_CHECKING:
    import torch

    from .stats import VCacheStats

logger = logging.getLogger("vllm.vcache")


class DeclinedWorker:
    """Refuses whatever is offered, in place of a `WorkerSide`, and says once that there is no use in offering more."""

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self._asked = False
        self._report = VCacheWorkerMetadata()
        self._finished = Finished(set(), set())

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Do nothing."""

    def unregister(self) -> None:
        """Do nothing."""

    def start_loads(self, metadata: VCacheMetadata) -> None:
        """Refuse all of them: their blocks hold nothing that counts."""
        if metadata.step and not self._asked:  # a scheduler's side that declines as well counts no steps
            self._asked = True
            self._report.off = 1
            logger.warning("VCache does not share the KV cache of this model: %s. Every look-up is a miss.", self._reason)
        for job in metadata.loads:
            self._report.loads[job.job] = LoadOutcome(1, 0)
            self._finished.bad_blocks.update(job.blocks)
            if job.blocking:
                self._report.failed_step = metadata.step
            else:
                self._finished.loaded.add(job.request)

    def start_saves(self, metadata: VCacheMetadata) -> None:
        """Refuse all of them."""
        self._report.saves |= {job.job: SaveOutcome(1, False, True) for job in metadata.saves}

    def finished(self, *, idle: bool = False) -> Finished:
        """Take what was refused since the last call."""
        finished, self._finished = self._finished, Finished(set(), set())
        return finished

    def report(self) -> VCacheWorkerMetadata | None:
        """Take what the scheduler's side has to hear since the last call; None when there is nothing to say."""
        report, self._report = self._report, VCacheWorkerMetadata()
        return report or None

    def take_stats(self) -> VCacheStats | None:
        """Return None: nothing is counted."""
        return None

    def close(self) -> None:
        """Do nothing."""
