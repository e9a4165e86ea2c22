"""A worker's side: starts the jobs of each step beside it, and reports which are over."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from ...cache.opening import open_cache
from ...cache.transfer import StreamFollower
from ...errors import VCacheError
from .jobs import Rank, Saved, SaveUnderWay, ShardStore, own_caches, this_rank
from .keys import worker_spec
from .kv_group import KVGroup
from .lend_size import lendable
from .metadata import LoadJob, LoadOutcome, SaveJob, SaveOutcome, VCacheMetadata, VCacheWorkerMetadata
from .settings import Settings
from .stats import VCacheStats
from .threads import Run, Threads, Work

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("vllm.vcache")

T = TypeVar("T")
DROPPED = Saved(SaveOutcome(1, False, True))
IDLE_WAIT = 1e-3
"""Seconds that an engine with nothing to compute waits for a load before it looks again. It must not spin: the threads that
load need the interpreter."""
KNOWN = (VCacheError, OSError)
"""Errors whose text says enough. Any other (torch, Triton and CUDA have several of their own) is logged with its traceback."""


class Finished(NamedTuple):
    """What ended since the last call."""

    loaded: set[str]
    """Requests whose load is over, well or badly."""
    bad_blocks: set[int]
    """Blocks that were to be loaded and hold something else."""


class WorkerSide:
    """Loads and saves one worker's shard. Called by the model runner's thread; the work is done by a few threads of its own.

    A broken set-up (an unknown layout, no memory to lend) does not stop the engine: it is logged, and everything is a miss.
    """

    def __init__(self, vllm_config: Any, group: KVGroup, namespace: bytes, chunk_tokens: int, settings: Settings) -> None:
        self._vllm_config = vllm_config
        self._group = group
        self._namespace = namespace
        self._chunk_tokens = chunk_tokens
        self._settings = settings
        self._store: ShardStore | None = None
        self._rank = Rank(0, True)
        self._loaders = Threads("vcache-load", settings.options.load_threads, self._log)
        self._savers = Threads("vcache-save", settings.options.save_threads, self._log)
        self._failed_step = 0
        self._off = False
        self._lock = threading.Lock()
        """Guards what follows: written by the threads, emptied by the runner's."""
        self._report = VCacheWorkerMetadata()
        self._load_ended = threading.Condition(self._lock)
        self._loading = 0
        """Loads beside the steps that are not reported yet."""
        self._loaded: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._stats = VCacheStats()

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Understand the KV cache, open the pool, lend memory. Blocks up to `manager.connect_timeout`."""
        self.unregister()
        try:
            self._rank = this_rank(self._group)
            self._store = self._open(own_caches(kv_caches, self._group))
        except Exception as error:  # noqa: BLE001 - whatever it is, the engine can do without
            self._turn_off(error)
        else:
            self._tell_off(False)

    def unregister(self) -> None:
        """Let go of the KV cache: wait for transfers, give back what was lent."""
        if self._store is not None:
            self._loaders.drain()
            self._savers.drain()
            store, self._store = self._store, None
            try:
                store.close()
            except Exception as error:  # noqa: BLE001 - vLLM goes to sleep, or ends
                self._log("the pool was not left in order", error)

    def start_loads(self, metadata: VCacheMetadata) -> None:
        """Start the loads of a step; returns when those are done that the step itself needs. Broken chunks are dropped beside
        them, and before the saves of the step."""
        if metadata.namespace not in (b"", self._namespace) and self._store is not None:
            self.unregister()
            self._turn_off("the scheduler sees another model, other weights or other settings than this worker")
        store = self._store
        if store is not None and not metadata.storage:
            store.leave_storage()
        if store is not None and metadata.broken:
            self._savers.submit(partial(store.drop, metadata.broken), _nothing, _at_once)
        if not metadata.loads:
            return
        beside = [job for job in metadata.loads if not job.blocking]
        for job in metadata.loads:
            if job.blocking and not self._load(job, store):
                self._failed_step = metadata.step
                with self._lock:
                    self._report.failed_step = metadata.step
        if beside:
            run = self._follower()
            with self._lock:
                self._loading += len(beside)
            for job in beside:
                load = partial(self._load_beside, job)
                self._loaders.submit(partial(load, store), partial(load, None), run)

    def start_saves(self, metadata: VCacheMetadata) -> None:
        """Start the saves of a step, after its forward pass was launched. Blocks only for jobs that say so."""
        if not metadata.saves:
            return
        store = self._store
        if store is None or not self._rank.saves or self._failed_step > metadata.failures_known:
            outcome = DROPPED.outcome if self._rank.saves else SaveOutcome(1, True, False)
            with self._lock:
                self._report.saves |= {job.job: outcome for job in metadata.saves}
                self._stats.add("save_drops", len(metadata.saves) if outcome.dropped else 0)
            return
        # One piece of work for all of them: threads that wake up for each contend with the runner for the interpreter.
        jobs = metadata.saves
        future = self._savers.submit(partial(self._save, store, jobs), partial(self._refuse, jobs), self._follower())
        if future is not None and any(job.blocking for job in jobs):
            wait([future])

    def finished(self, *, idle: bool = False) -> Finished:
        """Take what ended since the last call. Does not block; in an idle step, up to `IDLE_WAIT` for a load that ends."""
        if not self._loading and not self._bad_blocks:
            return Finished(set(), set())
        with self._lock:
            if idle and self._loading:
                self._load_ended.wait_for(lambda: self._loaded, IDLE_WAIT)
            if not self._loaded and not self._bad_blocks:
                return Finished(set(), set())
            result = Finished(self._loaded, self._bad_blocks)
            self._loading -= len(self._loaded)
            self._loaded, self._bad_blocks = set(), set()
        return result

    def report(self) -> VCacheWorkerMetadata | None:
        """Take what the scheduler's side has to hear since the last call; None when there is nothing to say."""
        if not self._report:
            return None  # what comes in this moment is said in the next step
        with self._lock:
            report, self._report = self._report, VCacheWorkerMetadata()
        return report

    def take_stats(self) -> VCacheStats | None:
        """Take the counters since the last call; None when nothing happened."""
        if self._stats.is_empty():
            return None
        with self._lock:
            stats, self._stats = self._stats, VCacheStats()
        for tier, nbytes in self._store.take_loaded_bytes().items() if self._store is not None else ():
            stats.add(f"load_bytes_{tier}", nbytes)
        return stats

    def close(self) -> None:
        """Finish what was started, give back what was lent. Idempotent."""
        self._loaders.close()
        self._savers.close()
        self.unregister()

    # -- in the threads --------------------------------------------------------------------------------------------

    def _load_beside(self, job: LoadJob, store: ShardStore | None) -> None:
        try:
            self._load(job, store)
        finally:
            with self._lock:
                self._loaded.add(job.request)
                self._load_ended.notify_all()

    def _load(self, job: LoadJob, store: ShardStore | None) -> bool:
        """Whether all blocks of the job were loaded; none are without a store."""
        began = time.perf_counter()
        loaded, bad = 0, job.blocks
        broken: tuple[bytes, ...] = ()
        try:
            if store is not None:
                loaded = store.load(job)
                bad = store.failed_blocks(job, loaded)
                broken = store.broken(job)
        except Exception as error:  # noqa: BLE001 - the request waits for its blocks, and can be recomputed
            self._log(f"load of request {job.request} failed, it is recomputed", error)
        finally:  # whatever happened, the blocks hold what is reported here, or nothing that counts
            tokens = sum(job.tokens[:loaded]) - (job.skip if loaded else 0)
            with self._lock:
                self._report.loads[job.job] = LoadOutcome(1, loaded, broken)
                if bad:
                    self._bad_blocks.update(bad)
                    self._stats.add("load_failures")
                self._stats.add("loads")
                self._stats.add("load_tokens", tokens)
                self._stats.add("load_bytes", tokens * self._group.token_bytes)
                self._stats.add("load_seconds", time.perf_counter() - began)
        return not bad

    def _save(self, store: ShardStore, jobs: list[SaveJob]) -> None:
        """Start all of them, then wait for each. Each is reported as soon as it is over, whatever becomes of the others."""
        started: list[tuple[SaveJob, SaveUnderWay]] = []
        for job in jobs:
            save = self._guarded(job, partial(store.start_save, job))
            if save is None:
                self._saved(job, DROPPED)
            elif self._guarded(job, save.landed):
                self._saved(job, self._guarded(job, save.finish) or DROPPED)
            else:
                started.append((job, save))
        for job, save in started:
            self._saved(job, self._guarded(job, save.finish) or DROPPED)

    def _guarded(self, job: SaveJob, work: Callable[[], T]) -> T | None:
        """The result of a part of a save; None, and a line in the log, when it breaks."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - the scheduler waits for all of them to free their blocks
            self._log(f"save of request {job.request} failed", error)
        return None

    def _refuse(self, jobs: list[SaveJob]) -> None:
        for job in jobs:
            self._saved(job, DROPPED)

    def _saved(self, job: SaveJob, saved: Saved) -> None:
        with self._lock:
            self._report.saves[job.job] = saved.outcome
            self._stats.add("saves")
            self._stats.add("save_drops", not saved.outcome.complete)
            self._stats.add("save_bytes", saved.nbytes)
            self._stats.add("save_seconds", saved.seconds)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _open(self, kv_caches: Mapping[str, torch.Tensor]) -> ShardStore:
        from ...paged.checksum import slot_bytes_for
        from ...paged.layout import PagedCache
        from ...paged.mover import Target
        from ...paged.select import mover_for

        spec = worker_spec(self._vllm_config, self._group, len(kv_caches), self._rank.shard)
        cache = PagedCache.bind(kv_caches, spec)
        slot_bytes = slot_bytes_for(spec.payload_bytes(self._chunk_tokens), self._settings.config.cache.checksum)
        segment = lendable(self._settings, slot_bytes, cache.device)
        config = msgspec.structs.replace(self._settings.config, segment=segment)
        target = Target(cache, mover_for(cache, config.transfer))
        device = f"cuda:{cache.device.index or 0}" if cache.device.type == "cuda" else "cpu"
        name = f"vllm-{str(self._vllm_config.kv_transfer_config.engine_id)[:12]}-{self._rank.shard}"
        opened = open_cache(config, spec, name, device, chunk_size=self._chunk_tokens, namespace=self._namespace)
        logger.info(
            "VCache worker: shard %d of %d, layout %s, %d layers, chunks of %d tokens (%.1f MiB), lending %.0f MiB, manager %s",
            spec.rank,
            spec.world_size,
            cache.layout,
            spec.num_layers,
            self._chunk_tokens,
            slot_bytes / 2**20,
            opened.lent_bytes() / 2**20,
            config.manager.address,
        )
        return ShardStore(target, opened, self._group.block_size)

    def _follower(self) -> Run:
        """How to run work in a thread, after what the current stream has queued."""
        store = self._store
        if store is None:
            return _at_once
        try:
            return StreamFollower(store.target.cache.device).run
        except Exception as error:  # noqa: BLE001 - work that cannot follow the stream must not be done
            return partial(_fail, error)

    def _turn_off(self, error: Exception | str) -> None:
        text = "VCache is off on this worker, every look-up of this instance is a miss: %s"
        logger.error(text, error, exc_info=_traceback(error))
        self._tell_off(True)

    def _tell_off(self, off: bool) -> None:
        """Let the scheduler know, once, whether there is a use in offering anything."""
        with self._lock:
            self._report.off += off - self._off
            self._off = off

    def _log(self, what: str, error: BaseException) -> None:
        traceback = _traceback(error)
        if traceback is None:
            logger.warning("%s: %s", what, error)
        else:
            logger.error("%s with an error that was not foreseen; its chunks are misses", what, exc_info=traceback)
        with self._lock:
            self._stats.add("errors")


def _traceback(error: BaseException | str) -> BaseException | None:
    return None if isinstance(error, (str, *KNOWN)) else error


def _at_once(work: Work) -> None:
    work()


def _fail(error: Exception, work: Work) -> None:
    raise error


def _nothing() -> None:
    """Nobody waits for it."""
