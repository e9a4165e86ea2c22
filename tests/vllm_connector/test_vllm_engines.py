"""Real vLLM engines that share one pool: tokens equal to those without a connector, hits counted, controls that must differ.

Engines are expensive to start, so tests share them and run in the order of this file.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.cluster import Command, eventually
from tiny_models import prompt, write_llama_weights, write_model
from vllm_harness import CHUNK, START, EngineProcess, connector, managers, require_vllm

if TYPE_CHECKING:
    from collections.abc import Iterator

require_vllm()
pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]

LENGTH = 300
"""Tokens of a prompt: 4 whole chunks of 64, and a rest."""
WHOLE = LENGTH // CHUNK * CHUNK
COUNT = 40


def prompts(first: int, count: int = 3) -> list[list[int]]:
    return [prompt(seed, LENGTH) for seed in range(first, first + count)]


class Pool:
    """A manager that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"unix://{folder}/manager.sock"
        self.start()

    def start(self) -> None:
        self.command = Command(self.folder, "serve", "--address", self.address)
        self.command.wait_for("manager ready")

    def kill(self) -> None:
        self.command.kill()


class Bench:
    """A process that runs one engine after another."""

    def __init__(self, folder: Path) -> None:
        self.runtime = folder / "runtime"
        self.runtime.mkdir(mode=0o700)
        self.process = EngineProcess(folder, "bench", XDG_RUNTIME_DIR=str(self.runtime))

    def engine(self, model: str, config: dict[str, Any] | None, **options: Any) -> EngineProcess:
        self.process.call("stop")
        self.process.call("start", START, model=model, connector=config, **options)
        return self.process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[Pool]:
    pool = Pool(folder)
    yield pool
    pool.kill()


@pytest.fixture(scope="module")
def llama(folder: Path) -> str:
    return str(write_model(folder / "llama"))


@pytest.fixture(scope="module")
def bench(folder: Path) -> Iterator[Bench]:
    bench = Bench(folder)
    yield bench
    bench.process.kill()


@pytest.fixture(scope="module")
def reference(bench: Bench, llama: str) -> list[list[int]]:
    """Tokens after each prompt, from an engine without a connector; `reference[seed]` belongs to `prompt(seed, LENGTH)`."""
    tokens = bench.engine(llama, None).call("generate", prompts=prompts(0, COUNT))["tokens"]
    assert len({tuple(each) for each in tokens}) == COUNT, "prompts must show in the tokens, or equal tokens prove nothing"
    return tokens


@pytest.fixture(scope="module")
def a(folder: Path, pool: Pool, llama: str) -> Iterator[EngineProcess]:
    """Lends memory; loads asynchronously; prefills in pieces of 96 tokens."""
    engine = EngineProcess(folder, "a")
    config = connector(pool.address, sync_load_budget=0)
    engine.send("start", model=llama, connector=config, max_num_batched_tokens=96, max_num_seqs=4)
    engine.answer(START)
    yield engine
    engine.kill()


def start_b(folder: Path, pool: Pool, llama: str) -> EngineProcess:
    engine = EngineProcess(folder, "b")
    config = connector(pool.address, sync_load_budget="1GiB", **{"segment.lend": False})
    engine.call("start", START, model=llama, connector=config)
    return engine


class B:
    """The second engine, which some tests replace."""

    def __init__(self, folder: Path, pool: Pool, llama: str) -> None:
        self.arguments = folder, pool, llama
        self.process = start_b(*self.arguments)

    def again(self) -> None:
        self.process.kill()
        self.process = start_b(*self.arguments)


@pytest.fixture(scope="module")
def b(folder: Path, pool: Pool, llama: str) -> Iterator[B]:
    """Lends nothing; loads within the step; prefills whole prompts."""
    b = B(folder, pool, llama)
    yield b
    b.process.kill()


def check(result: dict[str, Any], first: int, reference: list[list[int]], cached: int | None = None) -> None:
    count = len(result["tokens"])
    assert result["tokens"] == reference[first : first + count]
    if cached is not None:
        assert result["cached"] == [cached] * count


def counted(result: dict[str, Any], name: str) -> float:
    return result["counters"].get(f"vllm:vcache_{name}", 0)


def computed_by(engine: EngineProcess, first: int, reference: list[list[int]], count: int = 3) -> None:
    """Let an engine compute prompts that nobody has, and save them."""
    result = engine.call("generate", prompts=prompts(first, count))
    check(result, first, reference, cached=0)
    engine.call("settle")


def test_what_one_computes_the_other_loads(reference: list[list[int]], a: EngineProcess, b: B) -> None:
    computed_by(a, 0, reference)
    result = b.process.call("generate", prompts=prompts(0))
    check(result, 0, reference, cached=WHOLE)
    assert counted(result, "load_tokens") == counted(result, "hit_tokens") == 3 * WHOLE
    assert counted(result, "load_failures") == 0
    assert counted(result, "load_bytes") == 3 * WHOLE * 3 * 2 * 2 * 64 * 4  # tokens, layers, K and V, heads, head size, float32


def test_the_other_way_asynchronously_and_many_at_once(reference: list[list[int]], a: EngineProcess, b: B) -> None:
    computed_by(b.process, 3, reference, count=6)
    result = a.call("generate", prompts=prompts(3, 6))  # 6 requests, 4 at a time
    check(result, 3, reference, cached=WHOLE)
    assert counted(result, "load_tokens") == 6 * WHOLE


def test_own_prefix_cache_comes_first_and_only_the_rest_is_loaded(reference: list[list[int]], a: EngineProcess, b: B) -> None:
    longer = prompt(0, LENGTH)[:160] + prompt(9, LENGTH)[160:]
    want = a.call("generate", prompts=[longer])
    a.call("settle")
    got = b.process.call("generate", prompts=[longer])  # B has prompt 0, hence 160 tokens of this one
    assert got["tokens"] == want["tokens"]
    assert got["cached"] == [WHOLE]
    assert counted(got, "load_tokens") == WHOLE - 160


def test_abort_leaves_nothing_behind(a: EngineProcess, b: B) -> None:
    for steps, seed in enumerate((0, 1, 2), start=0):
        a.call("reset")
        assert a.call("abort", ids=prompt(seed, LENGTH), steps=steps) == [0, 0]
        assert b.process.call("abort", ids=prompt(30 + seed, LENGTH), steps=steps) == [0, 0]


def test_an_overwritten_slot_is_computed_again_in_both_ways_of_loading(
    reference: list[list[int]], a: EngineProcess, b: B
) -> None:
    computed_by(a, 12, reference)
    assert a.call("garble") > 2**20
    within = b.process.call("generate", prompts=prompts(12))
    check(within, 12, reference)
    assert (counted(within, "load_failures"), counted(within, "load_tokens")) == (3, 0)
    a.call("reset")
    beside = a.call("generate", prompts=prompts(12))
    check(beside, 12, reference)
    assert (counted(beside, "load_failures"), counted(beside, "load_tokens")) == (3, 0)


def test_reset_with_the_connector_forgets_for_everybody(reference: list[list[int]], a: EngineProcess, b: B) -> None:
    assert a.call("reset", connector=True)
    computed_by(a, 15, reference)
    assert b.process.call("generate", prompts=prompts(15, 1))["cached"] == [WHOLE]
    assert a.call("reset", connector=True)
    check(b.process.call("generate", prompts=prompts(16, 2)), 16, reference, cached=0)


def test_the_manager_dies_and_comes_back(reference: list[list[int]], pool: Pool, a: EngineProcess, b: B) -> None:
    computed_by(a, 18, reference)
    pool.kill()
    check(b.process.call("generate", prompts=prompts(20, 1)), 20, reference, cached=0)
    pool.start()

    def found() -> bool:
        b.process.call("reset")
        result = b.process.call("generate", prompts=prompts(18, 2))
        check(result, 18, reference)
        return result["cached"] == [WHOLE] * 2

    eventually(found, 40, what="hits after the manager's restart")


def test_an_engine_dies_and_comes_back(reference: list[list[int]], a: EngineProcess, b: B) -> None:
    computed_by(a, 22, reference)
    b.again()
    check(b.process.call("generate", prompts=prompts(22)), 22, reference, cached=WHOLE)


def test_control_without_verification_wrong_bytes_show(reference: list[list[int]], a: EngineProcess, b: B) -> None:
    computed_by(a, 25, reference)
    b.process.call("blind")
    check(b.process.call("generate", prompts=prompts(25, 1)), 25, reference, cached=WHOLE)
    a.call("garble")
    result = b.process.call("generate", prompts=prompts(26, 2))
    assert result["cached"] == [WHOLE] * 2
    for seed, tokens in zip((26, 27), result["tokens"], strict=True):
        assert tokens != reference[seed]


def test_one_flag_is_enough(bench: Bench, llama: str, reference: list[list[int]]) -> None:
    """No address, no options, the name from the entry point: a manager is started, memory is lent, chunks are of 256 tokens."""
    address = f"unix://{bench.runtime}/vcache/manager.sock"
    try:
        engine = bench.engine(llama, {"kv_connector": "VCacheConnector", "kv_role": "kv_both"})
        assert len(managers(address)) == 1
        computed_by(engine, 0, reference, count=1)
        engine.call("reset")
        check(engine.call("generate", prompts=prompts(0, 1)), 0, reference, cached=256)
        assert '"kv_load_failure_policy":"recompute"' in engine.log.read_text(), "the warning about the policy"
    finally:
        for process in managers(address):
            os.kill(process, signal.SIGKILL)


def test_a_child_of_multi_connector(bench: Bench, pool: Pool, llama: str, reference: list[list[int]], a: EngineProcess) -> None:
    """It is a consumer besides: it loads, and saves nothing."""
    assert a.call("reset", connector=True)
    computed_by(a, 28, reference)
    config = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [connector(pool.address, "kv_consumer")]},
    }
    engine = bench.engine(llama, config)
    check(engine.call("generate", prompts=prompts(28)), 28, reference, cached=WHOLE)
    assert counted(engine.call("generate", prompts=prompts(31, 1)), "saves") == 0


def test_the_lender_dies(reference: list[list[int]], folder: Path, pool: Pool, llama: str, a: EngineProcess, b: B) -> None:
    computed_by(a, 32, reference, count=2)
    a.process.send_signal(signal.SIGKILL)
    a.process.wait(30)
    b.again()
    check(b.process.call("generate", prompts=prompts(32, 2)), 32, reference)


def test_preemption_under_pressure(bench: Bench, pool: Pool, llama: str, reference: list[list[int]]) -> None:
    """Too few blocks for two requests at their ends; saves, preemptions and reloads go on at the same time."""
    tight = {"num_gpu_blocks_override": 28, "max_model_len": 512, "max_num_seqs": 4}
    engine = bench.engine(llama, connector(pool.address, save_decoded=True), **tight)
    many = prompts(34, 6)
    plain = engine.call("generate", prompts=many, tokens=160)
    assert [tokens[:12] for tokens in plain["tokens"]] == reference[34:40]
    assert plain["counters"]["vllm:num_preemptions"] > 0
    again = engine.call("generate", prompts=many, tokens=160)
    assert again["tokens"] == plain["tokens"]
    assert counted(again, "load_tokens") > 0
    engine.call("settle")


def test_without_prefix_caching(bench: Bench, pool: Pool, llama: str, reference: list[list[int]]) -> None:
    engine = bench.engine(llama, connector(pool.address), enable_prefix_caching=False)
    computed_by(engine, 10, reference, count=2)
    check(engine.call("generate", prompts=prompts(10, 2)), 10, reference, cached=WHOLE)


def test_sliding_window_groups_are_declined_and_work_as_one_group(bench: Bench, pool: Pool, folder: Path) -> None:
    model = str(write_model(folder / "gemma3", "gemma3"))
    engine = bench.engine(model, connector(pool.address))
    assert engine.call("facts")["declined"]
    assert "--disable-hybrid-kv-cache-manager" in engine.log.read_text()
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
    assert len(engine.call("generate", prompts=prompts(0, 2))["tokens"]) == 2


def test_two_workers_in_processes_of_their_own(folder: Path, pool: Pool) -> None:
    model = write_model(folder / "llama-file")
    write_llama_weights(model)
    engine = EngineProcess(folder, "tp2", VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    try:
        engine.call(
            "start",
            200,
            model=str(model),
            connector=connector(pool.address),
            load_format="safetensors",
            tensor_parallel_size=2,
            max_num_batched_tokens=128,
        )
        cold = engine.call("generate", prompts=prompts(0))
        assert len({tuple(tokens) for tokens in cold["tokens"]}) == 3
        eventually(lambda: engine.call("reset"), what="blocks are free once saves are over")
        warm = engine.call("generate", prompts=prompts(0))
        assert warm["cached"] == [WHOLE] * 3
        assert warm["tokens"] == cold["tokens"]
        assert counted(warm, "load_tokens") == 2 * 3 * WHOLE, "each worker loads its shard"
    finally:
        engine.kill()
