"""An engine of vLLM, as a process of its own serves it; the parent's side is `gpu_vllm_world.py`.

`drive` serves requests while they arrive, as a server does: their times are taken here, from the note that brings a request to
the step that brings its token.
"""

from __future__ import annotations

import json
import queue
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpu_vllm_model import strong_weights

from vcache.worker import Line

_SETTLE = 30.0


class Engine:
    """`line` brings what `drive` serves."""

    def __init__(self, line: Line, options: dict[str, Any], connector: dict[str, Any] | None) -> None:
        began = time.perf_counter()
        from vllm import LLM
        from vllm.config import KVTransferConfig

        strong_weights(json.loads((Path(options["model"]) / "config.json").read_text()))
        if connector is not None:
            options["kv_transfer_config"] = KVTransferConfig(**connector)
        self.llm: Any = LLM(**options)
        self._line = line
        self._requests = 0
        self._seconds = time.perf_counter() - began

    def started(self) -> float:
        """Seconds that it took to make it."""
        return self._seconds

    def generate(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """All at once; returns when all are done. `ms`: of the whole call."""
        began = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], self._parameters(tokens), use_tqdm=False)
        seconds = time.perf_counter() - began
        return {
            "ms": 1e3 * seconds,
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens for output in outputs],
        }

    def drive(self) -> int:
        """Serve `{"id", "prompt", "tokens"}` notes until `{"end": true}` has come and all are done; how many. Tells for each
        request `{"id", "ttft", "gaps", "cached", "asked", "tokens"}`: seconds, and numbers of tokens."""
        engine, running = self.llm.llm_engine, dict[str, dict[str, Any]]()
        ended, served = False, 0
        while not ended or running:
            while True:
                try:
                    order = self._line.heard(0.0 if running else 0.002)
                except queue.Empty:
                    break
                if order.get("end"):
                    ended = True
                    continue
                self._requests += 1
                name = f"driven-{self._requests}"
                running[name] = {"id": order["id"], "began": time.perf_counter(), "times": [], "asked": len(order["prompt"])}
                engine.add_request(name, {"prompt_token_ids": order["prompt"]}, self._parameters(order["tokens"], stream=True))
            if not running:
                self._idle_step()
                continue
            for output in engine.step():
                state = next((value for key, value in running.items() if _same(output.request_id, key)), None)
                if state is None:
                    continue
                now = time.perf_counter()
                have = len(output.outputs[0].token_ids)
                state["times"] += [now] * (have - len(state["times"]))
                if output.finished:
                    served += 1
                    running = {key: value for key, value in running.items() if value is not state}
                    self._line.tell(_driven(state, output.num_cached_tokens or 0))
        return served

    def settle(self, pause: float = 0.0) -> None:
        """Step the idle engine until its transfers are over; at most 30 seconds."""
        deadline = time.monotonic() + _SETTLE
        time.sleep(pause)
        while self._idle_step() and time.monotonic() < deadline:
            pass

    def reset(self) -> bool:
        return bool(self.llm.reset_prefix_cache())

    def counters(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            value = getattr(metric, "value", None)
            if value and ("vcache" in metric.name or "external" in metric.name or "preemption" in metric.name):
                found[metric.name] = found.get(metric.name, 0) + value
        return found

    def worker_stats(self) -> dict[str, Any]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        store = get_kv_transfer_group()._worker._store
        return {
            "metrics": store.cache.metrics.snapshot(),
            "segments": store.cache.describe(),
            "layout": store.target.cache.layout,
        }

    def device(self) -> dict[str, Any]:
        import torch

        if not torch.cuda.is_available():
            return {"name": "cpu"}
        free, total = torch.cuda.mem_get_info()
        return {"name": torch.cuda.get_device_name(), "free": free, "total": total, "torch": torch.__version__}

    def _idle_step(self) -> bool:
        """Let an engine without requests go on with its transfers; whether there were any."""
        core = self.llm.llm_engine.engine_core.engine_core
        if not core.scheduler.has_requests():
            return False
        core.step_fn()
        return True

    @staticmethod
    def _parameters(tokens: int, *, stream: bool = False) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.CUMULATIVE if stream else RequestOutputKind.FINAL_ONLY
        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=kind)


def _same(found: str, given: str) -> bool:
    """Newer versions add something of their own to a request's id."""
    return found == given or found.startswith(f"{given}-")


def _driven(state: dict[str, Any], cached: int) -> dict[str, Any]:
    times: list[float] = state["times"]
    return {
        "id": state["id"],
        "ttft": times[0] - state["began"],
        "gaps": [later - earlier for earlier, later in pairwise(times)],
        "cached": cached,
        "asked": state["asked"],
        "tokens": len(times),
    }
