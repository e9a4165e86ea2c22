"""A process that runs one vLLM engine after another, by commands: one JSON object a line on stdin, one answer a line on stdout.

Not a test. `vllm_harness.EngineProcess` talks to it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

# Before vLLM is imported, answers get a channel of their own: vLLM logs to stdout.
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


class Engine:
    """The engine of this process, if one was started."""

    def __init__(self) -> None:
        self.llm: Any = None

    def start(self, model: str, connector: dict[str, Any] | None, **arguments: Any) -> None:
        from tiny_models import draw_strong_weights
        from vllm import LLM
        from vllm.config import KVTransferConfig

        draw_strong_weights()
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
        self.llm = LLM(**options)

    def generate(self, prompts: list[list[int]], tokens: int = 12) -> dict[str, Any]:
        from vllm import SamplingParams

        before = self.counters()
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
            use_tqdm=False,
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
        for _ in range(5000):
            if not core.scheduler.has_requests():
                return
            core.step_fn()
        raise RuntimeError("the engine does not come to rest")

    def reset(self, connector: bool = False) -> bool:
        return bool(self.llm.reset_prefix_cache(reset_connector=connector))

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
        lender = self.worker()._store._resources.lender
        total = 0
        for slab in lender.info.slabs:
            memory = lender.slab(slab.index).buffer
            memory[:] = bytes([0x3D]) * len(memory)
            total += len(memory)
        return total

    def blind(self) -> None:
        """Switch verification off: the negative control."""
        from vcache.paged.cpu_mover import CpuMover

        def load_one(mover: Any, cache: Any, slots: Any, transfer: Any) -> bool:
            count = transfer.header.tokens - transfer.skip
            mover._move(cache, slots[transfer.start : transfer.start + count], transfer, to_slot=False)
            return True

        CpuMover._load_one = load_one

    def facts(self) -> dict[str, Any]:
        """What the connector of this process knows about itself."""
        connector = self.connector()
        scheduler, worker = connector._scheduler, self.worker()
        return {
            "declined": scheduler is None,
            "lent": worker._store._resources.lent_bytes() if worker is not None and worker._store is not None else 0,
            "layout": worker._store.cache.layout if worker is not None and worker._store is not None else "",
        }

    def connector(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler.connector

    def worker(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        group = get_kv_transfer_group()
        return getattr(group, "_connectors", [group])[0]._worker

    def stop(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()
            cleanup_dist_env_and_memory()


def main() -> None:
    engine = Engine()
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
