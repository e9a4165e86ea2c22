"""Kinds of KV caches on real engines: shared, or declined in one line while the engine runs as if VCache was not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from shared_engines import WHOLE, Bench, Pool, prompts
from tiny_models import write_model
from vllm_harness import EngineProcess, connector, require_vllm

require_vllm()
pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]


def declined(engine: EngineProcess, kind: str, before: int = 0) -> str:
    """The one line that says so. `before`: lines of other models in the log."""
    lines = engine.log.read_text().splitlines()
    found = [line for line in lines if "VCache does not share the KV cache of this model" in line and kind in line]
    (line,) = found[before:]
    return line


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        (["full", "sliding"], "2 KV cache groups .* --disable-hybrid-kv-cache-manager"),
        (["full", "chunked"], "2 KV cache groups .* --disable-hybrid-kv-cache-manager"),
        (["full", "sliding", "mamba"], r"3 KV cache groups \([^;]*\), one can be shared$"),
        (["sliding", "chunked"], r"2 KV cache groups \([^;]*\), one can be shared$"),
        (["sliding"], "kind SlidingWindowSpec: only full attention and MLA are supported$"),
        (["mamba"], "kind MambaSpec: only full attention and MLA are supported$"),
        (["full", "wide window"], r"2 KV cache groups \([^;]*\), one can be shared$"),
        ([], "the model has no KV cache$"),
    ],
)
def test_what_is_declined_and_the_advice_that_helps(kinds: list[str], text: str) -> None:
    from types import SimpleNamespace

    import torch
    from vllm.v1 import kv_cache_interface as vllm

    from vcache.integrations.vllm.kv_group import DeclinedError, shared_group

    row = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    specs = {
        "full": vllm.FullAttentionSpec(**row),
        "sliding": vllm.SlidingWindowSpec(**row, sliding_window=64),
        "wide window": vllm.SlidingWindowSpec(**row | {"head_size": 16}, sliding_window=64),
        "chunked": vllm.ChunkedLocalAttentionSpec(**row, attention_chunk_size=64),
        "mamba": vllm.MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,)),
    }
    groups = [SimpleNamespace(kv_cache_spec=specs[kind], layer_names=[kind]) for kind in kinds]
    config = SimpleNamespace(cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"), parallel_config=SimpleNamespace())
    with pytest.raises(DeclinedError, match=text):
        shared_group(config, SimpleNamespace(kv_cache_groups=groups))


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize(
    ("layers", "shared"),
    [
        (["full", "full"], True),
        (["mla", "mla"], True),
        (["full", "window"], True),
        (["full", "wide"], False),
        (["full", "wide window"], False),
        (["wide", "window"], False),
        (["full", "many heads"], False),
        (["mla", "indexer"], False),
        (["full", "full", "drafter"], False),
    ],
)
def test_both_sides_decide_alike(world: Any, layers: list[str], shared: bool, layout: str) -> None:
    """By the configurations that vLLM makes for its workers, and of those for its scheduler: that one is told of the first of
    several sizes. The worker declined, the scheduler's side offered."""
    import torch
    from vllm.v1 import kv_cache_interface as vllm
    from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, get_kv_cache_configs

    from vcache.integrations.vllm.kv_group import DeclinedError, shared_group

    row = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    kinds = {
        "full": vllm.FullAttentionSpec(**row),
        "wide": vllm.FullAttentionSpec(**row | {"head_size": 128}),
        "many heads": vllm.FullAttentionSpec(**row | {"num_kv_heads": 4}),
        "drafter": vllm.FullAttentionSpec(**row | {"num_kv_heads": 1}),
        "window": vllm.SlidingWindowSpec(**row, sliding_window=64),
        "wide window": vllm.SlidingWindowSpec(**row | {"head_size": 128}, sliding_window=64),
        "mla": vllm.MLAAttentionSpec(**row | {"num_kv_heads": 1, "head_size": 576}),
        "indexer": vllm.MLAAttentionSpec(**row | {"num_kv_heads": 1, "head_size": 132}),
    }
    config = world().scheduler.vllm_config
    config.scheduler_config.disable_hybrid_kv_cache_manager = True
    config.cache_config.kv_cache_layout = layout
    specs = {f"model.layers.{number}": kinds[kind] for number, kind in enumerate(layers)}
    workers = get_kv_cache_configs(config, [specs], [1 << 30])
    decided = []
    for each in (*workers, generate_scheduler_kv_cache_config(workers)):
        try:
            decided.append(shared_group(config, each))
        except DeclinedError as error:
            decided.append(str(error))
    assert decided[0] == decided[1]
    assert isinstance(decided[0], tuple) == shared
    if not shared:
        assert "differ in size" in str(decided[0])


def test_sliding_window_groups_are_declined_and_work_as_one_group(bench: Bench, pool: Pool, folder: Path) -> None:
    model = str(write_model(folder / "gemma3", "gemma3"))
    engine = bench.engine(model, connector(pool.address))
    assert engine.call("facts")["declined"]
    assert "--disable-hybrid-kv-cache-manager" in declined(engine, "SlidingWindowSpec")
    cold = engine.call("generate", prompts=prompts(0, 2))
    assert engine.call("reset")
    assert engine.call("generate", prompts=prompts(0, 2))["cached"] == [0, 0]
    engine = bench.engine(model, connector(pool.address), disable_hybrid_kv_cache_manager=True)
    assert engine.call("generate", prompts=prompts(0, 2))["tokens"] == cold["tokens"]
    engine.call("settle")
    assert engine.call("reset")
    warm = engine.call("generate", prompts=prompts(0, 2))
    assert warm["cached"] == [WHOLE] * 2
    assert warm["tokens"] == cold["tokens"]


def test_layers_of_different_sizes_are_declined_by_both_sides(bench: Bench, pool: Pool, folder: Path) -> None:
    """vLLM tells the scheduler of the first layer alone, so its side offered what no worker took, and heard no answer: an idle
    engine never came to rest, and `reset_prefix_cache` failed for ever. It was our own line that advised the flag."""
    model = str(write_model(folder / "gemma4", "gemma4"))
    before = bench.process.log.read_text().count("(FullAttentionSpec, SlidingWindowSpec)")
    engine = bench.engine(model, connector(pool.address))
    assert "--disable" not in declined(engine, "(FullAttentionSpec, SlidingWindowSpec)", before)
    cold = engine.call("generate", prompts=prompts(0, 2))
    engine = bench.engine(model, connector(pool.address), disable_hybrid_kv_cache_manager=True)
    assert engine.call("generate", prompts=prompts(0, 2))["tokens"] == cold["tokens"]
    engine.call("settle")
    assert engine.call("reset")
    warm = engine.call("generate", prompts=prompts(0, 2))
    assert warm["cached"] == [0, 0]
    assert warm["tokens"] == cold["tokens"]
    assert engine.call("facts")["declined"]
    assert declined(engine, "differ in size")


def test_mla(bench: Bench, pool: Pool, folder: Path) -> None:
    """On a CPU, hits take another numeric path than whole prompts (vLLM has no prefix hits there): one token is compared."""
    engine = bench.engine(str(write_model(folder / "mla", "mla")), connector(pool.address), block_size=None)
    facts = engine.call("facts")
    assert not facts["declined"]
    assert facts["layout"] == "B1NC"
    cold = engine.call("generate", prompts=prompts(0, 3), tokens=1)
    engine.call("settle")
    engine.call("reset")
    warm = engine.call("generate", prompts=prompts(0, 3), tokens=1)
    assert warm["cached"] == [WHOLE] * 3
    assert warm["tokens"] == cold["tokens"]


def test_mamba_groups_are_declined(bench: Bench, pool: Pool, folder: Path) -> None:
    model = str(write_model(folder / "qwen3next", "qwen3next"))
    engine = bench.engine(model, connector(pool.address), block_size=None, dtype="bfloat16")
    assert engine.call("facts")["declined"]
    assert "--disable" not in declined(engine, "MambaSpec")
    tokens = engine.call("generate", prompts=prompts(0, 2))["tokens"]
    without = bench.engine(model, None, block_size=None, dtype="bfloat16")
    assert without.call("generate", prompts=prompts(0, 2))["tokens"] == tokens
