"""One worker's shard of the pool: its KV cache, understood, and the loads and saves of whole jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ...cache.opening import Resources
from ...cache.pool import Chunk, ChunkPool, PoolTransfer, PutReport
from ...cache.room_maker import RoomMaker
from ...cache.storage_tier import ChunkStorage
from ...metrics import EngineMetrics
from ...paged.mover import Rows, Target
from .kv_group import KVGroup
from .metadata import LoadJob, SaveJob, SaveOutcome

if TYPE_CHECKING:
    import torch


logger = logging.getLogger("vllm.vcache")

CLOSE_WAIT = 5.0
"""Seconds that writes get to end when the store closes."""


class Rank(NamedTuple):
    """Which shard a worker holds."""

    shard: int
    saves: bool
    """False where another worker holds the same shard (MLA under tensor parallelism)."""


def this_rank(group: KVGroup) -> Rank:
    """The rank of this worker process. Call it after vLLM set up its process groups."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    tensor, pipeline = get_tp_group(), get_pp_group()
    if group.mla:
        return Rank(int(pipeline.rank_in_group), int(tensor.rank_in_group) == 0)
    return Rank(int(tensor.rank_in_group) + int(tensor.world_size) * int(pipeline.rank_in_group), True)


def own_caches(kv_caches: Mapping[str, torch.Tensor], group: KVGroup) -> dict[str, torch.Tensor]:
    """The tensors of the group's layers on this worker; layers that share one tensor appear once. Pure."""
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name in group.layer_names:
        tensor = kv_caches.get(name)
        if tensor is None:
            continue
        place = tensor.data_ptr(), tuple(tensor.stride())
        if place not in seen:
            seen.add(place)
            found[name] = tensor
    return found


class Saved(NamedTuple):
    """What became of a save."""

    outcome: SaveOutcome
    nbytes: int = 0
    """Written."""
    seconds: float = 0.0
    """How long they took to move."""


class SaveUnderWay(NamedTuple):
    """A save that was started."""

    landed: Callable[[], bool]
    """Whether the bytes are in the pool. Does not block."""
    finish: Callable[[], Saved]
    """Publish the chunks, and hand them to the storage tier if there is one. To be called once; blocks until the blocks may be
    reused."""


class ShardStore:
    """Loads and saves jobs. Thread-safe; nothing raises for a miss."""

    def __init__(
        self,
        target: Target,
        pool: ChunkPool,
        lower: ChunkStorage | None,
        resources: Resources,
        metrics: EngineMetrics,
        block_size: int,
        relief: RoomMaker | None = None,
    ) -> None:
        """Owns `resources`, `lower` and `relief`: `close` closes them. `block_size`: tokens in a block of vLLM's table."""
        self.target = target
        self.metrics = metrics
        self.pool = pool
        self._lower = lower
        self._resources = resources
        self._block_size = block_size
        self._relief = relief
        self._leave_storage = False

    def load(self, job: LoadJob) -> int:
        """Bring the chunks of a job into its blocks; number of leading chunks that are there and verified. Blocks until the
        bytes have landed."""
        rows = self._rows(job.blocks)
        chunks, start = [], 0
        for index, (digest, tokens) in enumerate(zip(job.digests, job.tokens, strict=True)):
            skip = job.skip if index == 0 else 0
            chunks.append(Chunk(digest, job.first + index, tokens, start, skip))
            start += tokens - skip
        loaded = 0
        while loaded < len(chunks):
            before, rest = loaded, chunks[loaded:]
            lease = self.pool.acquire([chunk.digest for chunk in rest])
            if lease is not None:
                flags = self.pool.load(lease, rest, rows).result()
                loaded += next((i for i, ok in enumerate(flags) if not ok), len(flags))
            if self._lower is not None and not self._leave_storage and loaded < len(chunks):
                parent = chunks[loaded - 1].digest if loaded else b""
                loaded += self._lower.load(chunks[loaded:], rows, parent)
            if loaded == before:
                break
        return loaded

    def start_save(self, job: SaveJob) -> SaveUnderWay:
        """Start to store the chunks of a job that the pool does not have. Blocks for a round trip; on a CPU, for the copy."""
        rows = self._rows(job.blocks)
        chunks, start = [], 0
        for index, (digest, tokens) in enumerate(zip(job.digests, job.tokens, strict=True)):
            chunks.append(Chunk(digest, job.first + index, tokens, start))
            start += tokens
        put = self.pool.put(chunks, job.parent, rows)
        return SaveUnderWay(put.done, partial(self._finish_save, put, rows))

    def _finish_save(self, put: PoolTransfer[PutReport], rows: Rows) -> Saved:
        report = put.result()
        if self._lower is not None and not self._leave_storage:
            self._lower.save_later(report.stored)
            self._lower.save_now(report.unplaced, rows)
        return Saved(SaveOutcome(1, not report.unplaced, False), report.nbytes, report.seconds)

    def leave_storage(self) -> None:
        """Read nothing from the storage tier any more, and write nothing to it. Idempotent."""
        self._leave_storage = True

    def broken(self, job: LoadJob) -> tuple[bytes, ...]:
        """Chunks of a job that failed verification: their slots hold something else than the manager says."""
        return tuple(self.pool.broken(job.digests))

    def drop(self, digests: list[bytes]) -> None:
        """Take broken chunks out of the pool, so that they can be saved again. Blocks for about a round trip, at most
        `manager.deadline` and two seconds."""
        self.pool.mark_broken(digests)
        self.pool.drop_broken(digests)

    def failed_blocks(self, job: LoadJob, loaded: int) -> list[int]:
        """Blocks of a job whose contents are not to be trusted when `loaded` leading chunks are there. Pure."""
        good = sum(job.tokens[:loaded]) - (job.skip if loaded else 0)
        return job.blocks[good // self._block_size :]

    def close(self) -> None:
        """Wait for writes, give back what was lent. Bounded. Idempotent."""
        if self._relief is not None:
            self._relief.close(5.0)
        if not self.pool.wait_writes(CLOSE_WAIT):
            logger.warning("writes to the pool do not end: the manager is left without a goodbye, and keeps their slots")
        if self._lower is not None:
            self._lower.close(5.0)
        self._resources.close()

    def _rows(self, blocks: list[int]) -> Rows:
        """The rows of these blocks, token by token."""
        import torch

        first = torch.tensor(blocks, dtype=torch.int64)[:, None] * self._block_size
        return Rows(self.target, (first + torch.arange(self._block_size)).flatten())
