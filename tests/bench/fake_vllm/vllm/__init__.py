"""A vLLM that computes nothing: as much of it as the GPU scripts speak to. A request takes a step for each token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

__version__ = "0.0"


class SamplingParams:
    def __init__(self, *, max_tokens: int, **options: Any) -> None:
        self.max_tokens = max_tokens


class LLM:
    def __init__(self, *, model: str, **options: Any) -> None:
        print("what vLLM prints on standard output is no answer")
        self._running: dict[str, list[int]] = {}
        core = SimpleNamespace(scheduler=SimpleNamespace(has_requests=lambda: False), step_fn=lambda: None)
        engine_core = SimpleNamespace(engine_core=core)
        self.llm_engine = SimpleNamespace(add_request=self._add, step=self._step, engine_core=engine_core)

    def generate(self, prompts: list[dict[str, list[int]]], parameters: SamplingParams, use_tqdm: bool) -> list[Any]:
        def answer(ids: list[int]) -> Any:
            tokens = [sum(ids) % 97] * parameters.max_tokens
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)], num_cached_tokens=len(ids))

        return [answer(prompt["prompt_token_ids"]) for prompt in prompts]

    def reset_prefix_cache(self) -> bool:
        return True

    def get_metrics(self) -> list[Any]:
        return []

    def _add(self, name: str, prompt: dict[str, list[int]], parameters: SamplingParams) -> None:
        self._running[name] = [0, parameters.max_tokens]

    def _step(self) -> list[Any]:
        outputs = []
        for name, state in list(self._running.items()):
            state[0] += 1
            finished = state[0] >= state[1]
            tokens = SimpleNamespace(token_ids=[1] * state[0])
            found = {"request_id": f"{name}-0af1", "outputs": [tokens], "finished": finished, "num_cached_tokens": 0}
            outputs.append(SimpleNamespace(**found))
            if finished:
                del self._running[name]
        return outputs
