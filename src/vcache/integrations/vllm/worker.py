"""A worker's side: starts the jobs of each step beside it, and reports which are over."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from ...cache.opening import open_cache
from ...errors import VCacheError
from .jobs import Rank, Saved, ShardStore, own_caches, this_rank
from .keys import worker_spec
from .kv_group import KVGroup
from .lend_size import lendable
from .loads import Landed, Loads
from .metadata import LateReport, LoadOutcome, SaveJob, VCacheMetadata, VCacheWorkerMetadata
from .saver import DROPPED, Saver
from .settings import Settings
from .stats import VCacheStats
from .step_events import SideStream, StepEvents, after_now, side_stream

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("vllm.vcache")

IDLE_WAIT = 1e-3
"""Seconds that an engine with nothing to compute waits for a load before it looks again."""
END_WAIT = 5.0
"""Seconds that loads, and then saves, get to end when the KV cache goes away."""
MAP_WAIT = 300.0
"""Seconds that a start waits for memory of the pool to be mapped: an engine that serves stands still while it is."""
KNOWN = (VCacheError, OSError)
"""Errors whose text says enough. Any other (torch, Triton and CUDA have several of their own) is logged with its traceback."""


class WorkerSide:
    """Loads and saves one worker's shard. Called by the model runner's thread, but for what a `LateReport` takes.

    A broken set-up (an unknown layout, no memory to lend) does not stop the engine: it is logged, and everything is a miss.
    """

    def __init__(
        self,
        vllm_config: Any,
        group: KVGroup,
        namespace: bytes,
        chunk_tokens: int,
        settings: Settings,
        *,
        loads: bool = True,
        late: bool = True,
    ) -> None:
        """`loads`: whether the scheduler's side may ask for any. `late`: whether reports may say what landed after they were
        made (`late_reports`); they then stand for what `finished` tells."""
        self._vllm_config = vllm_config
        self._group = group
        self._namespace = namespace
        self._chunk_tokens = chunk_tokens
        self._settings = settings
        self._may_load = loads
        self._late = loads and late
        self._store: ShardStore | None = None
        self._rank = Rank(0, True)
        self._loads = Loads(settings.options.load_threads, settings.options.lookup_deadline_ms / 1e3, self._log)
        self._saver = Saver(self._saved, self._log)
        self._events = StepEvents(None)
        self._save_stream: SideStream | None = None
        self._failed_step = 0
        self._off = False
        self._lock = threading.Lock()
        """Guards what follows."""
        self._report = VCacheWorkerMetadata()
        self._failed: list[Landed] = []
        """Loads with bad blocks that vLLM has not heard of."""
        self._told: dict[int, LoadOutcome] = {}
        """By job: loads whose bad blocks vLLM hears of in this step. They must not be reported in another one before."""
        self._loaded: set[str] = set()
        """Requests whose load is over, where `finished` tells."""
        self._stats = VCacheStats()

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Understand the KV cache, open the pool, lend memory. Blocks up to `manager.connect_timeout`."""
        self.unregister()
        try:
            self._rank = this_rank(self._group)
            self._use(self._open(own_caches(kv_caches, self._group)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the engine can do without
            self._turn_off(error)
        else:
            self._tell_off(False)

    def unregister(self) -> None:
        """Let go of the KV cache: wait for transfers, give back what was lent. Bounded."""
        if self._store is not None:
            store, self._store = self._store, None
            self._events, self._save_stream = StepEvents(None), None
            ended = self._loads.drain(END_WAIT)
            if not (self._saver.drain(END_WAIT) and ended):
                logger.error("transfers did not end within %g s; what they use is left behind", END_WAIT)
                return
            try:
                store.close()
            except Exception as error:  # noqa: BLE001 - vLLM goes to sleep, or ends
                self._log("the pool was not left in order", error)

    def begin_step(self, metadata: VCacheMetadata) -> None:
        """Start the loads of a step that run beside it. Broken chunks are dropped before the saves of the step.

        To be called before anything of the step is launched: it is told here where the step begins on the GPU. Blocks for the
        questions to the manager, at most `lookup_deadline_ms` for all loads of the step.
        """
        store = self._store
        if self._may_load and store is not None:
            try:
                self._events.record(metadata.step)
            except Exception as error:  # noqa: BLE001 - the GPU failed: nothing can follow this step
                self._log("a step was not followed, its loads fail", error)
                store = None
        if metadata.namespace not in (b"", self._namespace) and self._store is not None:
            self.unregister()
            self._turn_off("the scheduler sees another model, other weights or other settings than this worker")
            store = None
        if store is not None and not metadata.storage:
            store.leave_storage()
        if store is not None and metadata.broken:
            self._saver.drop(store, metadata.broken)
        if metadata.loads:
            self._loads.launch([job for job in metadata.loads if not job.blocking], store, self._events)

    def load_within(self, metadata: VCacheMetadata) -> None:
        """Do the loads that the step itself needs. Blocks until they are over."""
        for job in metadata.loads:
            if job.blocking:
                landed = self._loads.load(job, self._store)
                if landed.bad:
                    self._failed_step = metadata.step
                self._record(landed)

    def start_saves(self, metadata: VCacheMetadata) -> None:
        """Start the saves of a step, after its forward pass was launched. Blocks only for jobs that say so."""
        jobs, store = metadata.saves, self._store
        if not jobs:
            return
        if store is None or not self._rank.saves or self._failed_step > metadata.failures_known:
            outcome = DROPPED.outcome._replace(complete=not self._rank.saves, dropped=self._rank.saves)
            with self._lock:
                self._report.saves |= {job.job: outcome for job in jobs}
                self._stats.add("save_drops", len(jobs) if outcome.dropped else 0)
            return
        try:
            after = after_now(self._save_stream)
        except Exception as error:  # noqa: BLE001 - work that cannot follow the step must not be done
            self._log("a transfer was not started", error)
            for job in jobs:
                self._saved(job, DROPPED)
            return
        over = self._saver.save(jobs, store, after)
        if any(job.blocking for job in jobs):
            over.wait()

    def finished(self, *, idle: bool = False) -> set[str]:
        """See which loads have landed; take the requests of those, unless reports tell of them. Does not block; in an idle
        step, up to `IDLE_WAIT` for a load that lands."""
        if idle:
            self._loads.wait(IDLE_WAIT)
        self._collect()
        if not self._loaded:
            return set()
        with self._lock:
            loaded, self._loaded = self._loaded, set()
        return loaded

    def bad_blocks(self) -> set[int]:
        """Take the blocks that were to be loaded and hold something else. To be called in each step before `report`."""
        if not self._failed:
            return set()
        with self._lock:
            failed, self._failed = self._failed, []
            self._told |= {landed.job.job: landed.outcome for landed in failed}
        return {block for landed in failed for block in landed.bad}

    def report(self) -> VCacheWorkerMetadata | None:
        """Make the report of a step. One that is late says what lands until it is read; any other says what happened since the
        last one, and is None when that is nothing."""
        told, self._told = self._told, {}
        said = VCacheWorkerMetadata(told)
        if self._late:
            return LateReport(said, self._take)
        return said.aggregate(self._take()) or None

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
        """Finish what was started, give back what was lent. Bounded. Idempotent."""
        self.unregister()
        self._loads.close()
        self._saver.close()

    # -- what is over, in any thread -------------------------------------------------------------------------------

    def _take(self) -> VCacheWorkerMetadata:
        """Take what there is to say, but for loads with bad blocks: those are told in the step that tells of the blocks."""
        self._collect()
        with self._lock:
            report, self._report = self._report, VCacheWorkerMetadata()
        return report

    def _collect(self) -> None:
        for landed in self._loads.take():
            self._record(landed)

    def _record(self, landed: Landed) -> None:
        job, outcome = landed.job, landed.outcome
        tokens = sum(job.tokens[: outcome.chunks]) - (job.skip if outcome.chunks else 0)
        with self._lock:
            if landed.bad:
                self._failed.append(landed)
                self._stats.add("load_failures")
                if job.blocking:
                    self._report.failed_step = self._failed_step
            else:
                self._report.loads[job.job] = outcome
            if not (job.blocking or self._late):
                self._loaded.add(job.request)
            self._stats.add("loads")
            self._stats.add("load_tokens", tokens)
            self._stats.add("load_bytes", tokens * self._group.token_bytes)
            self._stats.add("load_seconds", landed.seconds)
            self._stats.add("load_waits", landed.waited)

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
        began = time.monotonic()
        if not opened.wait_mapped(MAP_WAIT):
            logger.warning("memory of the pool is not mapped yet; transfers wait for what they need of it")
        elif (took := time.monotonic() - began) > 1:
            logger.info("mapped %.1f GiB of the pool in %.0f s", opened.segments.mapped_bytes() / 2**30, took)
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

    def _use(self, store: ShardStore) -> None:
        device = store.target.cache.device
        self._store, self._events, self._save_stream = store, StepEvents(side_stream(device)), side_stream(device)

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
