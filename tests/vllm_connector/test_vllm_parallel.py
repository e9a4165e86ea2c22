"""Tensor, pipeline and data parallelism on real engines, whose workers are processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from shared_engines import WHOLE, Pool, counted, prompts
from support.cluster import eventually
from tiny_models import write_llama_weights, write_model
from vllm_harness import EngineProcess, connector, require_vllm

if TYPE_CHECKING:
    from collections.abc import Iterator

require_vllm()
pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]

START = 200.0


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    """A model with a file of weights, because the trick with the strong dummy weights does not reach other processes."""
    path = write_model(folder / "llama-file")
    write_llama_weights(path)
    return str(path)


@pytest.fixture
def start(folder: Path, pool: Pool, model: str) -> Iterator[Any]:
    """Starts an engine with options of vLLM; it ends with the test."""
    engines: list[EngineProcess] = []

    def start(name: str, *arguments: str, config: dict[str, Any] | None = None, **options: Any) -> EngineProcess:
        env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        engine = EngineProcess(folder, name, *arguments, **env)
        engines.append(engine)
        config = connector(pool.address) if config is None else config
        engine.call("start", START, model=model, connector=config, load_format="safetensors", **options)
        return engine

    yield start
    for engine in engines:
        engine.kill()


def cold_and_warm(engine: EngineProcess) -> tuple[list[list[int]], float]:
    """Compute prompts, forget them, load them: the tokens, and how many were loaded, summed up over the workers."""
    cold = engine.call("generate", prompts=prompts(0))
    assert len({tuple(tokens) for tokens in cold["tokens"]}) == 3
    eventually(lambda: engine.call("reset"), what="blocks are free once saves are over")
    warm = engine.call("generate", prompts=prompts(0))
    assert warm["cached"] == [WHOLE] * 3
    assert warm["tokens"] == cold["tokens"]
    return cold["tokens"], counted(warm, "load_tokens")


def test_two_tensor_parallel_workers(start: Any) -> None:
    engine = start("tp2", tensor_parallel_size=2, max_num_batched_tokens=128)
    assert cold_and_warm(engine)[1] == 2 * 3 * WHOLE, "each worker loads its shard"


def test_two_pipeline_stages_of_different_size(start: Any) -> None:
    """Three layers: one stage has two of them, the other one. Two batches are under way at a time."""
    engine = start("pp2", pipeline_parallel_size=2, max_num_batched_tokens=128)
    assert cold_and_warm(engine)[1] == 2 * 3 * WHOLE, "each stage loads its shard"
    log = engine.log.read_text()
    for shard, layers in ((0, 2), (1, 1)):
        assert f"shard {shard} of 2, layout BHNC, {layers} layers" in log


def test_two_data_parallel_ranks(start: Any) -> None:
    """They are two engines with one command line; what one computes the other loads."""
    engine = start("dp2", "--data-parallel", data_parallel_size=2, distributed_executor_backend="uni")
    cold = engine.call("generate", prompts=prompts(4), rank=0)
    assert cold["cached"] == [0] * 3
    assert len({tuple(tokens) for tokens in cold["tokens"]}) == 3
    eventually(lambda: engine.call("reset"), what="blocks are free once saves are over")
    warm = engine.call("generate", prompts=prompts(4), rank=1)
    assert warm["cached"] == [WHOLE] * 3
    assert warm["tokens"] == cold["tokens"]
    log = engine.log.read_text()
    assert "_dp0" in log
    assert "_dp1" in log, "vLLM gives every rank an engine id of its own"
