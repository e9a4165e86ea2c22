"""vLLM's own scheduler with the connector, and a manager made of a set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from vllm_harness import require_vllm

if TYPE_CHECKING:
    from collections.abc import Sequence

require_vllm()

BLOCK, CHUNK = 16, 32


class Manager:
    """`Manager`, as far as the scheduler's side uses it. Everything in `keys` is present."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self.epoch = 2
        self.leases: set[int] = set()
        self.calls = 0
        self.probes = 0
        self.down = False
        self.removed: list[bytes] = []
        self.cleared: list[bytes] = []

    def acquire(self, keys: Sequence[bytes], shard: int = 0, *, lease: int = 0) -> Any:
        from vcache.errors import DeadlineExceededError
        from vcache.manager.api import AcquireReply

        self.calls += 1
        if self.down:
            raise DeadlineExceededError("too late")
        count = next((i for i, key in enumerate(keys) if key not in self.keys), len(keys))
        if not count:
            return AcquireReply(0, 0.0, [])
        self.leases.add(self.calls)
        return AcquireReply(self.calls, 30.0, [None] * count)  # type: ignore[list-item]

    def release(self, lease: int) -> None:
        self.leases.discard(lease)

    def tiers(self, keys: Sequence[bytes]) -> list[int]:
        from vcache.errors import DeadlineExceededError

        self.probes += 1
        if self.down:
            raise DeadlineExceededError("too late")
        return [0 if key in self.keys else -1 for key in keys]

    def clear(self, namespace: bytes = b"") -> int:
        self.cleared.append(namespace)
        self.keys.clear()
        return 0

    def remove(self, keys: Sequence[bytes]) -> int:
        self.removed += keys
        return len(keys)

    def close(self) -> None:
        self.leases.clear()


class World:
    """A scheduler with the connector, and the worker's answers in the test's hands."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, blocks: int = 64, **extra: Any) -> None:
        import torch
        from vllm.config import (
            CacheConfig,
            DeviceConfig,
            KVTransferConfig,
            ModelConfig,
            SchedulerConfig,
            VllmConfig,
        )
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from vcache.integrations.vllm import connector
        from vcache.integrations.vllm.stats import VCacheStats

        self.manager = Manager()
        monkeypatch.setattr(connector, "connect", lambda *args, **kwargs: self.manager)
        role = extra.pop("kv_role", "kv_both")
        ahead = extra.pop("ahead", False)
        budget = extra.pop("sync_load_budget", 0)
        policy = extra.pop("kv_load_failure_policy", "recompute")
        cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=extra.pop("prefix_caching", True))
        cache.kv_cache_layout = "LBHNC"
        config = VllmConfig(
            model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", seed=0),
            cache_config=cache,
            device_config=DeviceConfig("cpu"),
            scheduler_config=SchedulerConfig(
                max_num_seqs=8,
                max_num_batched_tokens=extra.pop("batched", 512),
                async_scheduling=False,
                max_model_len=1024,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
            ),
            kv_transfer_config=KVTransferConfig(
                kv_connector="VCacheConnector",
                kv_connector_module_path="vcache.integrations.vllm.connector",
                kv_role=role,
                kv_load_failure_policy=policy,
                kv_connector_extra_config={"address": "unix:///nowhere", "cache.chunk_size": CHUNK} | extra,
            ),
        )
        config.scheduler_config.async_scheduling = ahead  # as a GPU gets it by default
        group = KVCacheGroupSpec(
            ["layer.0"], FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        )
        cache.num_gpu_blocks = blocks
        self.scheduler = (AsyncScheduler if ahead else Scheduler)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[group]),
            log_stats=True,
            block_size=BLOCK,
            structured_output_manager=StructuredOutputManager(config),
        )
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.connector = self.scheduler.connector
        self.side = self.connector._scheduler
        self.side._policy = self.side._policy._replace(sync_load_budget=budget)  # whatever this version could take back
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.counted = VCacheStats()
        """The connector's counters, which vLLM takes in every step."""
        take = self.side.take_stats

        def take_and_count() -> VCacheStats | None:
            stats = take()
            if stats is not None:
                self.counted.aggregate(stats)
            return stats

        self.side.take_stats = take_and_count

    def add(self, name: str, tokens: Sequence[int], new: int = 4, **more: Any) -> Any:
        """`more`: of `Request`, such as `cache_salt`."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        parameters = SamplingParams(max_tokens=new, ignore_eos=True)
        parameters.update_from_generation_config({}, 2)
        request = Request(
            request_id=name,
            prompt_token_ids=list(tokens),
            sampling_params=parameters,
            pooling_params=None,
            block_hasher=self.hasher,
            **more,
        )
        self.scheduler.add_request(request)
        return request

    def digests(self, request: Any) -> list[bytes]:
        names = self.side._names
        ends = [(i + 1) * CHUNK for i in range(names.whole(request.block_hashes, request.num_tokens))]
        return list(names.of(request, ends, self.side._adapters.name(request.lora_request)))

    def publish(self, request: Any, chunks: int) -> None:
        self.manager.keys |= set(self.digests(request)[:chunks])

    def step(self, **answer: Any) -> Any:
        """Schedule, let the model run, report; the connector's metadata of the step."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        output = self.scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            request = self.scheduler.requests[name]
            done = request.num_computed_tokens >= request.num_tokens
            sampled.append([7] if done else [])
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=sampled,
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=None,
                kv_connector_output=KVConnectorOutput(**answer),
            ),
        )
        self.last = output
        return output.kv_connector_metadata

    def used(self) -> int:
        return int(len(self.pool.blocks) - 1 - self.pool.get_num_free_blocks())


def loaded(job: Any, chunks: int | None = None, broken: tuple[bytes, ...] = (), **more: Any) -> dict[str, Any]:
    """A worker's report of a load: all of it, or only the first chunks; and what failed verification."""
    from vcache.integrations.vllm.metadata import LoadOutcome, VCacheWorkerMetadata

    good = len(job.digests) if chunks is None else chunks
    bad = set() if chunks is None else set(job.blocks[(sum(job.tokens[:good]) - (job.skip if good else 0)) // BLOCK :])
    return {
        "finished_recving": {job.request},
        "invalid_block_ids": bad,
        "kv_connector_worker_meta": VCacheWorkerMetadata(loads={job.job: LoadOutcome(1, good, broken)}, **more),
    }


def saved(*jobs: Any, complete: bool = True, dropped: bool = False, workers: int = 1) -> dict[str, Any]:
    from vcache.integrations.vllm.metadata import SaveOutcome, VCacheWorkerMetadata

    outcome = SaveOutcome(workers, complete, dropped)
    return {"kv_connector_worker_meta": VCacheWorkerMetadata(saves={job.job: outcome for job in jobs})}
