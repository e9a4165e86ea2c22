"""A process that runs one vLLM engine after another, by commands: one JSON object a line on stdin, one answer a line on stdout.

Not a test. `vllm_harness.EngineProcess` talks to it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from typing import Any

# Before vLLM is imported, answers get a channel of their own: vLLM logs to stdout.
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


class Engine:
    """The engine of this process, if one was started."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.events_socket: Any = None

    def start(self, model: str, connector: dict[str, Any] | None, **arguments: Any) -> None:
        from tiny_models import draw_strong_weights
        from vllm import LLM

        draw_strong_weights()
        self.llm = LLM(**self.options(model, connector, arguments))
        if self.llm.llm_engine.vllm_config.parallel_config.pipeline_parallel_size > 1:
            # On a CPU, eager mode skips the dummy run in which the later stages get their input buffers.
            self.llm.collective_rpc("execute_dummy_batch")

    def options(self, model: str, connector: dict[str, Any] | None, arguments: dict[str, Any]) -> dict[str, Any]:
        from vllm.config import KVEventsConfig, KVTransferConfig

        options = {
            "model": model,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 1024,
            "block_size": 32,
            "enable_prefix_caching": True,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "seed": 0,
            "disable_log_stats": False,
        } | arguments
        if options["block_size"] is None:
            del options["block_size"]
        if connector is not None:
            options["kv_transfer_config"] = KVTransferConfig(**connector)
        if "kv_events_config" in options:
            options["kv_events_config"] = KVEventsConfig(**options["kv_events_config"])
        return options

    def generate(
        self, prompts: list[list[int]], tokens: int = 12, salt: str | None = None, adapter: tuple[str, int, str] | None = None
    ) -> dict[str, Any]:
        """`adapter`: name, number and folder of a LoRA adapter."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        before = self.counters()
        salted = {} if salt is None else {"cache_salt": salt}
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} | salted for ids in prompts],
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
            use_tqdm=False,
            lora_request=LoRARequest(*adapter) if adapter is not None else None,
        )
        after = self.counters()
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens for output in outputs],
            "counters": {name: value - before.get(name, 0) for name, value in after.items()},
        }

    def settle(self) -> None:
        """Step until no save is under way: in this process nobody steps an idle engine."""
        core = self.llm.llm_engine.engine_core.engine_core
        deadline = time.monotonic() + 30.0
        while core.scheduler.has_requests():
            if time.monotonic() > deadline:
                raise RuntimeError("the engine does not come to rest")
            core.step_fn()

    def reset(self, connector: bool = False) -> bool:
        return bool(self.llm.reset_prefix_cache(reset_connector=connector))

    def sleep(self, level: int) -> None:
        """Go to sleep and wake up, with the loss of the KV cache that a GPU worker's sleep means: vLLM for CPUs ignores it."""
        self.llm.sleep(level)
        connector, runner = self.worker_connector(), self.runner()
        connector.unregister_kv_caches()
        for tensor in runner.kv_caches:
            tensor.fill_(1.0)
        connector.restore_kv_caches()  # vLLM 0.33 names no tensors
        self.llm.wake_up()

    def share_memory_storage(self) -> None:
        """Give scheduler and worker one storage tier in this process's memory, before `start`."""
        from vcache.cache import opening
        from vcache.integrations.vllm import connector
        from vcache.storage.memory import MemoryStorage

        storage = MemoryStorage()
        storage.close = lambda: None  # type: ignore[method-assign]
        original = opening.open_storage
        patched = lambda config: storage if config.kind == "memory" else original(config)  # noqa: E731
        opening.open_storage = connector.open_storage = patched

    def flush_storage(self) -> dict[str, int]:
        """Wait for writes to the storage tier; the worker's counters, and bytes read from storage."""
        store = self.worker()._store
        if not store.cache.storage.flush(20.0):
            raise RuntimeError("writes to storage do not end")
        snapshot = store.cache.metrics.snapshot()
        read = snapshot["operations"].get("retrieve", {}).get("storage", {}).get("bytes", 0)
        return snapshot["counters"] | {"storage_bytes": read}

    def listen(self, endpoint: str) -> None:
        """Subscribe to the KV cache events of this engine."""
        import zmq

        self.events_socket = zmq.Context.instance().socket(zmq.SUB)
        self.events_socket.connect(endpoint)
        self.events_socket.setsockopt(zmq.SUBSCRIBE, b"")

    def events(self) -> list[dict[str, Any]]:
        """What was published with our medium since the last call; waits a second for the first."""
        from msgspec.msgpack import Decoder
        from vllm.distributed.kv_events import BlockStored, KVEventBatch

        found: list[dict[str, Any]] = []
        while self.events_socket.poll(0 if found else 1000):
            batch = Decoder(KVEventBatch).decode(self.events_socket.recv_multipart()[2])
            for event in batch.events:
                if isinstance(event, BlockStored):
                    mine = {"medium": event.medium, "blocks": len(event.block_hashes), "tokens": event.token_ids}
                    found.append(mine | {"parent": event.parent_block_hash is not None, "size": event.block_size})
                else:
                    found.append({"event": type(event).__name__})
        return found

    def counters(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            value = getattr(metric, "value", None)
            if value is not None:
                found[metric.name] = found.get(metric.name, 0) + value
        return found

    def abort(self, ids: list[int], steps: int) -> list[int]:
        """Start a request, abort it after some steps; blocks still in use afterwards, once everything has settled."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        parameters = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        engine.add_request("aborted", {"prompt_token_ids": ids}, parameters)
        for _ in range(steps):
            engine.step()
        engine.abort_request(["aborted"])
        self.settle()
        scheduler = engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        return [len(scheduler.requests), len(pool.blocks) - 1 - pool.get_num_free_blocks()]

    def garble(self) -> int:
        """Overwrite all that this process lends, headers too; number of bytes."""
        lender = self.worker()._store.cache.lender
        total = 0
        for slab in lender.info.slabs:
            memory = lender.slab(slab.index).buffer
            memory[:] = bytes([0x3D]) * len(memory)
            total += len(memory)
        return total

    def blind(self, on: bool = True) -> None:
        """Switch verification off: the negative control. `on=False`: switch it on again."""
        from vcache.paged import cpu_mover
        from vcache.segment import slot_protocol

        def believe(*_: Any) -> bool:
            return True

        for name in ("carries", "still_carries"):
            setattr(cpu_mover, name, believe if on else getattr(slot_protocol, name))

    def facts(self) -> dict[str, Any]:
        """What the connector of this process knows about itself."""
        connector = self.connector()
        store = getattr(self.worker(), "_store", None)
        return {
            "declined": connector._scheduler is None,
            "lent": store.cache.lent_bytes() if store is not None else 0,
            "layout": store.target.cache.layout if store is not None else "",
        }

    def connector(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler.connector

    def worker_connector(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        group = get_kv_transfer_group()
        return getattr(group, "_connectors", [group])[0]

    def worker(self) -> Any:
        return self.worker_connector()._worker

    def runner(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    def stop(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()
            cleanup_dist_env_and_memory()


class ParallelEngine(Engine):
    """Data parallel: vLLM has that behind `AsyncLLM` only."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()

    def start(self, model: str, connector: dict[str, Any] | None, **arguments: Any) -> None:
        self.loop.run_until_complete(self._start(model, connector, arguments))

    async def _start(self, model: str, connector: dict[str, Any] | None, arguments: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**self.options(model, connector, arguments)))

    def generate(self, prompts: list[list[int]], tokens: int = 12, rank: int = 0) -> dict[str, Any]:  # type: ignore[override]
        """`rank`: the data-parallel rank that computes it."""
        return self.loop.run_until_complete(self._generate(prompts, tokens, rank))

    async def _generate(self, prompts: list[list[int]], tokens: int, rank: int) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        parameters.output_kind = RequestOutputKind.FINAL_ONLY
        found: dict[str, Any] = {"tokens": [], "cached": []}
        for number, ids in enumerate(prompts):
            name = f"{rank}-{number}-{os.urandom(4).hex()}"
            async for output in self.llm.generate({"prompt_token_ids": ids}, parameters, name, data_parallel_rank=rank):
                found["tokens"].append(list(output.outputs[0].token_ids))
                found["cached"].append(output.num_cached_tokens)
        return found

    def reset(self, connector: bool = False) -> bool:
        return bool(self.loop.run_until_complete(self.llm.reset_prefix_cache(reset_connector=connector)))


def main() -> None:
    engine = ParallelEngine() if "--data-parallel" in sys.argv else Engine()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            value = getattr(engine, command["do"])(**command.get("with", {}))
        except Exception as error:  # noqa: BLE001 - the test gets it
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        else:
            answers.write(json.dumps({"value": value}) + "\n")


if __name__ == "__main__":
    main()
