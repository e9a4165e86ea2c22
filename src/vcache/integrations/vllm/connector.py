"""`VCacheConnector`: vLLM's connector interface, dispatched to the scheduler's side or a worker's side. No logic of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA

from ...cache.opening import open_storage
from ...config import StorageConfig
from ...manager.connect import connect
from .autostart import ensure_manager
from .declined import DeclinedWorker
from .events import EventLog
from .keys import ChunkNames, chunk_tokens, namespace
from .kv_group import DeclinedError, KVGroup, deterministic_hashes, shared_group
from .metadata import VCacheMetadata, VCacheWorkerMetadata
from .scheduler import Policy, SchedulerSide
from .settings import Settings, read_settings
from .stats import VCachePromMetrics, VCacheStats
from .step_rule import StepRule
from .versions import late_reports, peer_source, safe_sync_budget
from .weights import of_model
from .worker import WorkerSide

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("vllm.vcache")
"""Below vLLM's logger, so that its handlers and levels apply."""

CONSUMER_WAIT_MS = 200.0


class VCacheConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Shares the KV cache of this instance with others through VCache.

    Every look-up is a miss, and the engine goes on, when the model's cache cannot be shared (one line in the log says why), or
    when the manager or a lender is away.
    """

    _cache_hit_source = peer_source()

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Called by vLLM, once in the scheduler's process and once in each worker. Raises `ConfigError` for unknown or bad
        keys in `kv_connector_extra_config`."""
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        settings = read_settings(self._kv_transfer_config.kv_connector_extra_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | DeclinedWorker | None = None
        self._kv_caches: dict[str, torch.Tensor] = {}
        self._late = late_reports()
        in_scheduler = role == KVConnectorRole.SCHEDULER
        try:
            if in_scheduler:
                deterministic_hashes(vllm_config.cache_config)
            group = shared_group(vllm_config, kv_cache_config)
            weights = of_model(vllm_config, settings.options.weights)
        except DeclinedError as error:
            if in_scheduler:
                logger.warning("VCache does not share the KV cache of this model: %s. Every look-up is a miss.", error)
            else:
                self._worker = DeclinedWorker(str(error), late=self._late)
            return
        chunk = chunk_tokens(settings.config.cache.chunk_size, group.block_size)
        space = namespace(vllm_config, group, chunk, weights)
        if settings.autostart:
            ensure_manager(settings.config.manager.address)
        if in_scheduler:
            names = ChunkNames(space, chunk, group.block_size, group.hash_block_size)
            zeroing = bool(getattr(kv_cache_config, "needs_kv_cache_zeroing", False))
            self._scheduler = self._scheduler_side(settings, group, names, zeroing)
        else:
            loads = self._kv_transfer_config.is_kv_consumer
            self._worker = WorkerSide(vllm_config, group, space, chunk, settings, loads=loads, late=self._late)

    def _scheduler_side(self, settings: Settings, group: KVGroup, names: ChunkNames, zeroing: bool) -> SchedulerSide:
        config, options, role = settings.config, settings.options, self._kv_transfer_config
        if role.kv_load_failure_policy != "recompute":
            logger.warning(
                "kv_load_failure_policy is %r: a request whose KV cannot be loaded (a lender was killed, say) will FAIL. "
                'Add "kv_load_failure_policy":"recompute" to --kv-transfer-config.',
                role.kv_load_failure_policy,
            )
        parallel = self._vllm_config.parallel_config
        workers = int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size)
        budget = safe_sync_budget(self._vllm_config, workers, options.sync_load_budget)
        wait = options.wait_for_prefill_ms
        if wait is None:
            wait = CONSUMER_WAIT_MS if role.kv_role == "kv_consumer" else 0
        policy = Policy(
            loads=role.is_kv_consumer,
            saves=role.is_kv_producer,
            save_decoded=options.save_decoded,
            save_tail=options.save_tail,
            min_load_tokens=options.min_load_tokens,
            wait=wait / 1e3,
            sync_load_budget=budget,
            workers=workers,
            clear_on_reset=options.reset == "clear",
        )
        deadline = options.lookup_deadline_ms / 1e3
        manager = connect(
            msgspec.structs.replace(config, manager=msgspec.structs.replace(config.manager, deadline=deadline)),
            name=f"vllm-{str(role.engine_id)[:12]}-scheduler",
        )
        storage = open_storage(_quick(config.storage, deadline)) if config.storage.kind != "none" else None
        events = getattr(self._vllm_config, "kv_events_config", None)
        log = EventLog(bool(events is not None and events.enable_kv_cache_events), group.hash_block_size)
        logger.info(
            "VCache: manager %s, namespace %s, chunks of %d tokens, %s, synchronous loads up to %d bytes",
            config.manager.address,
            names.namespace.hex(),
            names.chunk_tokens,
            " and ".join(word for word, on in (("loads", policy.loads), ("saves", policy.saves)) if on),
            budget,
        )
        return SchedulerSide(manager, group, names, policy, log, storage, StepRule(zeroing))

    # -- class methods ---------------------------------------------------------------------------------------------

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Nothing happens per layer."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Any layout will do: strides are read from the tensors."""
        return None

    @classmethod
    def supports_sleep_mode(cls, vllm_config: Any) -> bool:
        return True

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> VCacheStats:
        return VCacheStats(data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> VCachePromMetrics:
        return VCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- scheduler -------------------------------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """It is a cache: a save that is dropped is a miss later."""
        return False

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.block_refs.bind(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.match(request, num_computed_tokens) if self._scheduler is not None else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> VCacheMetadata:
        return self._scheduler.build(scheduler_output) if self._scheduler is not None else VCacheMetadata(0, 0)

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(report, VCacheWorkerMetadata):
            ended = self._scheduler.report(report.settled())
            if self._late and ended:  # vLLM reads them behind this call
                connector_output.finished_recving = ended.union(connector_output.finished_recving or ())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is not None:
            self._scheduler.finished(request)
        return False, None

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.busy()

    def has_pending_block_frees(self) -> bool:
        return self._scheduler is not None and self._scheduler.block_refs.only_holder()

    def take_events(self) -> Iterable[Any]:
        return self._scheduler.take_events() if self._scheduler is not None else ()

    def reset_cache(self) -> bool | None:
        return self._scheduler.reset() if self._scheduler is not None else None

    # -- worker ----------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._kv_caches = dict(kv_caches)
        if self._worker is not None:
            self._worker.register(kv_caches)

    def unregister_kv_caches(self) -> None:
        """vLLM goes to sleep: its KV cache is about to disappear."""
        if self._worker is not None:
            self._worker.unregister()

    def restore_kv_caches(self, kv_caches: dict[str, torch.Tensor] | None = None) -> None:
        """vLLM woke up. It names its tensors when they are others than before only."""
        self.register_kv_caches(self._kv_caches if kv_caches is None else kv_caches)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """The first call of a step, and the only one before the step is launched in all versions of vLLM: loads start here."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.load_within(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads that a step needs are over when `start_load_kv` returns, others are not its own."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Saves are started once for all layers, by `wait_for_save`."""

    def wait_for_save(self) -> None:
        """Start the saves of this step. They run beside the next ones; their blocks are held until they end."""
        if self._worker is not None:
            self._worker.start_saves(self._get_connector_metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        metadata = self._connector_metadata
        return None, self._worker.finished(idle=metadata is not None and metadata.idle) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.bad_blocks() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> VCacheWorkerMetadata | None:
        return self._worker.report() if self._worker is not None else None

    # -- both ------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> VCacheStats | None:
        if self._worker is not None:
            return self._worker.take_stats()
        return self._scheduler.take_stats() if self._scheduler is not None else None

    def shutdown(self) -> None:
        self._kv_caches = {}
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()


def _quick(storage: StorageConfig, deadline: float) -> StorageConfig:
    """The storage tier as the scheduler asks it: never longer than a look-up may take."""
    return msgspec.structs.replace(storage, deadline=min(storage.deadline, deadline))
