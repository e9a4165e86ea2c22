"""Fixtures: real engines, which are expensive and live for the whole session, and vLLM's scheduler without an engine."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from shared_engines import COUNT, B, Bench, Pool, prompts
from tiny_models import write_model
from vllm_harness import START, EngineProcess, connector

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a model that is never loaded."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 1000,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}" + bytes(8))
    return folder


@pytest.fixture
def world(one_layer: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a `scheduler_world.World`."""
    from scheduler_world import World

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda **extra: World(one_layer, monkeypatch, **extra)


@pytest.fixture
def caplog_vllm(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """vLLM's logger does not propagate to the root, where pytest listens."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def pool(folder: Path) -> Iterator[Pool]:
    pool = Pool(folder)
    yield pool
    pool.kill()


@pytest.fixture(scope="session")
def llama(folder: Path) -> str:
    return str(write_model(folder / "llama"))


@pytest.fixture(scope="session")
def bench(folder: Path) -> Iterator[Bench]:
    bench = Bench(folder)
    yield bench
    bench.process.kill()


@pytest.fixture(scope="session")
def reference(bench: Bench, llama: str) -> list[list[int]]:
    """Tokens after each prompt, from an engine without a connector; `reference[seed]` belongs to `prompt(seed, LENGTH)`."""
    tokens = bench.engine(llama, None).call("generate", prompts=prompts(0, COUNT))["tokens"]
    assert len({tuple(each) for each in tokens}) == COUNT, "prompts must show in the tokens, or equal tokens prove nothing"
    return tokens


@pytest.fixture(scope="session")
def a(folder: Path, pool: Pool, llama: str) -> Iterator[EngineProcess]:
    """Lends memory; loads asynchronously; prefills in pieces of 96 tokens."""
    engine = EngineProcess(folder, "a")
    config = connector(pool.address, sync_load_budget=0)
    engine.send("start", model=llama, connector=config, max_num_batched_tokens=96, max_num_seqs=4)
    engine.answer(START)
    yield engine
    engine.kill()


@pytest.fixture(scope="session")
def b(folder: Path, pool: Pool, llama: str) -> Iterator[B]:
    """Lends nothing; loads within the step; prefills whole prompts."""
    b = B(folder, pool, llama)
    yield b
    b.process.kill()
