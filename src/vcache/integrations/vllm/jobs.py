"""One worker's shard of the pool: its KV cache, understood, and the loads and saves of whole jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ...cache.opening import Cache
from ...cache.tiers import Loading, Saving
from ...keys import Chunk
from ...paged.mover import Rows, Target
from .kv_group import KVGroup
from .metadata import LoadJob, SaveJob, SaveOutcome

if TYPE_CHECKING:
    import torch


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


class _Named(NamedTuple):
    """Chunks of a job, as `Tiers.load` takes them: they have their names already."""

    chunks: list[Chunk]

    @property
    def length(self) -> int:
        return len(self.chunks)

    def runs(self, begin: int, head: int) -> list[list[Chunk]]:
        return [self.chunks[begin:]]

    def parent(self, index: int) -> bytes:
        return self.chunks[index - 1].digest if index else b""


def _chunks(job: LoadJob | SaveJob, skip: int = 0) -> list[Chunk]:
    """The chunks of a job; its blocks begin behind the first chunk's `skip` tokens. Pure."""
    chunks, start = [], 0
    for index, (digest, tokens) in enumerate(zip(job.digests, job.tokens, strict=True)):
        chunks.append(Chunk(digest, job.first + index, tokens, start, skip))
        start, skip = start + tokens - skip, 0
    return chunks


def _finish(saving: Saving) -> Saved:
    report = saving.finish()
    return Saved(SaveOutcome(1, not report.unplaced, False), report.nbytes, report.seconds)


class ShardStore:
    """Loads and saves jobs. Thread-safe; nothing raises for a miss."""

    def __init__(self, target: Target, cache: Cache, block_size: int) -> None:
        """Owns `cache`: `close` closes it. `block_size`: tokens in a block of vLLM's table."""
        self.target = target
        self.cache = cache
        self._block_size = block_size
        self._told: dict[str, int] = {}

    def take_loaded_bytes(self) -> dict[str, int]:
        """Bytes that loads brought since the last call, by tier. Not thread-safe."""
        now = self.cache.metrics.bytes_by_tier("retrieve")
        then, self._told = self._told, now
        return {tier: nbytes - then.get(tier, 0) for tier, nbytes in now.items()}

    def load(self, job: LoadJob) -> int:
        """Bring the chunks of a job into its blocks; number of leading chunks that are there and verified. Blocks until the
        bytes have landed."""
        return self.cache.tiers.load(_Named(_chunks(job, job.skip)), self._rows(job.blocks)).found

    def start_load(self, job: LoadJob, within: float) -> Loading:
        """Start what `load` does. Where `copies_beside`, blocks only for the question to the manager, `within` seconds."""
        return self.cache.tiers.start_load(_Named(_chunks(job, job.skip)), self._rows(job.blocks), within)

    def start_save(self, job: SaveJob) -> SaveUnderWay:
        """Start to store the chunks of a job that the pool does not have. Blocks for a round trip; on a CPU, for the copy."""
        saving = self.cache.tiers.save(_chunks(job), job.parent, self._rows(job.blocks))
        return SaveUnderWay(saving.landed, partial(_finish, saving))

    @property
    def copies_beside(self) -> bool:
        """Whether copies run beside the thread that starts them. On a CPU they run in it."""
        return bool(self.target.cache.device.type == "cuda")

    def leave_storage(self) -> None:
        """Read nothing from the storage tier any more, and write nothing to it. Idempotent."""
        self.cache.tiers.leave_storage()

    def broken(self, job: LoadJob) -> tuple[bytes, ...]:
        """Chunks of a job that failed verification: their slots hold something else than the manager says."""
        return tuple(self.cache.pool.broken(job.digests))

    def drop(self, digests: list[bytes]) -> None:
        """Take broken chunks out of the pool, so that they can be saved again. Blocks for about a round trip, at most
        `manager.deadline` and two seconds."""
        self.cache.pool.mark_broken(digests)
        self.cache.pool.drop_broken(digests)

    def failed_blocks(self, job: LoadJob, loaded: int) -> list[int]:
        """Blocks of a job whose contents are not to be trusted when `loaded` leading chunks are there. Pure."""
        good = sum(job.tokens[:loaded]) - (job.skip if loaded else 0)
        return job.blocks[good // self._block_size :]

    def close(self) -> None:
        """Wait for writes, give back what was lent. Bounded. Idempotent."""
        self.cache.close()

    def _rows(self, blocks: list[int]) -> Rows:
        """The rows of these blocks, token by token."""
        import numpy as np
        import torch

        first = np.fromiter(blocks, np.int64, len(blocks)) * self._block_size
        rows = (first[:, None] + np.arange(self._block_size)).reshape(-1)
        return Rows(self.target, torch.from_numpy(rows))
