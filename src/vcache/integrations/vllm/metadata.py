"""What travels between the scheduler's side of the connector and its workers, once per step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


class LoadJob(NamedTuple):
    """Bring consecutive chunks of one request into its blocks."""

    job: int
    request: str
    digests: list[bytes]
    first: int
    """Index of the first chunk in the prompt."""
    tokens: list[int]
    """Tokens of each chunk."""
    skip: int
    """Leading tokens of the first chunk that are there already."""
    blocks: list[int]
    """Blocks that hold the tokens to load, in order; the first holds token `skip` of the first chunk at its beginning. Those
    behind the last chunk, if any, are reported as not loaded."""
    blocking: bool
    """Load within the step, before its forward pass."""
    after: int = 0
    """Step whose beginning on the GPU the copy must wait for: see `step_rule.py`."""


class SaveJob(NamedTuple):
    """Store consecutive chunks of one request, once the forward pass of this step has computed them."""

    job: int
    request: str
    digests: list[bytes]
    parent: bytes
    """Digest of the chunk before the first; empty for none."""
    first: int
    tokens: list[int]
    blocks: list[int]
    """Blocks that hold these chunks, in order."""
    blocking: bool
    """Wait for the copy within the step, because nobody keeps these blocks from being reused."""


@dataclass
class VCacheMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler -> workers."""

    step: int
    failures_known: int
    """Last step with a failed blocking load that the scheduler has heard of. What a worker computed after a failure, and
    before this caught up, is wrong: it must not be saved."""
    idle: bool = False
    """Nothing is computed in this step: workers may wait a moment for loads."""
    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    storage: bool = True
    """False once the cache was reset: what the storage tier holds cannot be told from what is valid."""
    broken: list[bytes] = field(default_factory=list)
    """Chunks whose slots hold something else, on some worker: every worker drops them before its next save."""
    namespace: bytes = b""
    """Of these chunks. A worker that made another of what it sees (other weights, say) takes no part."""


class LoadOutcome(NamedTuple):
    """What became of a load job, over the workers that have reported."""

    workers: int
    chunks: int
    """Leading chunks that all of these workers have, verified."""
    broken: tuple[bytes, ...] = ()
    """Chunks that failed verification on one of them."""


class SaveOutcome(NamedTuple):
    """What became of a save job, over the workers that have reported."""

    workers: int
    complete: bool
    """All chunks are in the pool now, on all of these workers."""
    dropped: bool
    """Some worker did not even try."""


@dataclass
class VCacheWorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Workers -> scheduler."""

    loads: dict[int, LoadOutcome] = field(default_factory=dict)
    """By load job."""
    saves: dict[int, SaveOutcome] = field(default_factory=dict)
    """By save job."""
    failed_step: int = 0
    """Last step with a failed blocking load."""
    off: int = 0
    """Workers that ceased to load and save anything, less those that began again."""

    def __bool__(self) -> bool:
        """Whether it says anything."""
        return bool(self.loads or self.saves or self.failed_step or self.off)

    def settled(self) -> VCacheWorkerMetadata:
        """What it says when it is read."""
        return self

    def aggregate(self, other: KVConnectorWorkerMetadata) -> VCacheWorkerMetadata:
        """Add what another worker reports. Changes and returns `self`."""
        assert isinstance(other, VCacheWorkerMetadata)
        other = other.settled()
        for job, load in other.loads.items():
            self.loads[job] = merge_loads(self.loads.get(job), load)
        for job, save in other.saves.items():
            self.saves[job] = merge_saves(self.saves.get(job), save)
        self.failed_step = max(self.failed_step, other.failed_step)
        self.off += other.off
        return self


class LateReport(VCacheWorkerMetadata):
    """A worker's report on one step that also says what happens until it is read: until then the GPU computes.

    vLLM reads it, or pickles it for another process, when the GPU has finished the step.
    """

    def __init__(self, said: VCacheWorkerMetadata, take: Callable[[], VCacheWorkerMetadata]) -> None:
        """`said`: what belongs to this step and no other. `take`: takes what else there is to say; is called at most once, in
        any thread."""
        super().__init__(said.loads, said.saves, said.failed_step, said.off)
        self._take: Callable[[], VCacheWorkerMetadata] | None = take

    def __bool__(self) -> bool:
        """True: vLLM leaves out what is not."""
        return True

    def settled(self) -> VCacheWorkerMetadata:
        take, self._take = self._take, None
        if take is not None:
            super().aggregate(take())
        return VCacheWorkerMetadata(self.loads, self.saves, self.failed_step, self.off)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> VCacheWorkerMetadata:
        return self.settled().aggregate(other)

    def __reduce__(self) -> tuple[Any, ...]:
        report = self.settled()
        return VCacheWorkerMetadata, (report.loads, report.saves, report.failed_step, report.off)


def merge_loads(first: LoadOutcome | None, second: LoadOutcome) -> LoadOutcome:
    """Join two outcomes into that of the workers of both. Pure."""
    if first is None:
        return second
    broken = first.broken + tuple(each for each in second.broken if each not in first.broken)
    return LoadOutcome(first.workers + second.workers, min(first.chunks, second.chunks), broken)


def merge_saves(first: SaveOutcome | None, second: SaveOutcome) -> SaveOutcome:
    """Join two outcomes into that of the workers of both. Pure."""
    if first is None:
        return second
    return SaveOutcome(first.workers + second.workers, first.complete and second.complete, first.dropped or second.dropped)
