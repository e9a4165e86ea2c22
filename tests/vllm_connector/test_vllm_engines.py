"""Real vLLM engines that share one pool: tokens equal to those without a connector, hits counted, controls that must differ.

Engines are expensive to start, so tests share them and run in the order of this file.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from shared_engines import LENGTH, WHOLE, B, Bench, Pool, check, computed_by, counted, prompts
from support.cluster import eventually
from tiny_models import prompt
from vllm_harness import EngineProcess, connector, managers, require_vllm

require_vllm()
pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]


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


def test_an_overwritten_slot_is_computed_again_in_both_ways_of_loading_and_stored_again(
    reference: list[list[int]], a: EngineProcess, b: B
) -> None:
    computed_by(a, 12, reference)
    assert a.call("garble") > 2**20
    within = b.process.call("generate", prompts=prompts(12))
    check(within, 12, reference)
    assert (counted(within, "load_failures"), counted(within, "load_tokens")) == (3, 0)
    b.process.call("settle")
    a.call("reset")
    repaired = a.call("generate", prompts=prompts(12))
    check(repaired, 12, reference, cached=WHOLE)
    assert counted(repaired, "load_failures") == 0
    a.call("garble")
    a.call("reset")
    beside = a.call("generate", prompts=prompts(12))
    check(beside, 12, reference)
    assert (counted(beside, "load_failures"), counted(beside, "load_tokens")) == (3, 0)
    a.call("settle")
    b.process.call("reset")
    check(b.process.call("generate", prompts=prompts(12)), 12, reference, cached=WHOLE)


def test_tenants_with_a_cache_salt_meet_nobody_else(reference: list[list[int]], a: EngineProcess, b: B) -> None:
    a.call("reset")
    computed_by(a, 40, reference, count=2)
    for salt in ("tenant one", "tenant two"):
        first = b.process.call("generate", prompts=prompts(40, 2), salt=salt)
        check(first, 40, reference, cached=0)
        b.process.call("settle")
        check(a.call("generate", prompts=prompts(40, 2), salt=salt), 40, reference, cached=WHOLE)


def test_sleep_and_wake_up(reference: list[list[int]], a: EngineProcess, b: B) -> None:
    """Both levels empty the pool of this model for everybody (option `reset`); what B lost while it slept is not served."""
    for level in (1, 2):
        computed_by(a, 42, reference, count=2)
        check(b.process.call("generate", prompts=prompts(42, 2)), 42, reference, cached=WHOLE)
        b.process.call("sleep", level=level)
        check(b.process.call("generate", prompts=prompts(42, 1)), 42, reference, cached=0)
        b.process.call("settle")
        a.call("reset")
        check(a.call("generate", prompts=prompts(42, 2)[:1]), 42, reference, cached=WHOLE)
        check(a.call("generate", prompts=prompts(43, 1)), 43, reference, cached=0)
        a.call("settle")
        b.process.call("reset")
        check(b.process.call("generate", prompts=prompts(42, 2)), 42, reference, cached=WHOLE)
        assert a.call("reset", connector=True)
        assert b.process.call("reset")


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
    b.process.call("blind", on=False)
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


def test_a_prompt_that_takes_most_blocks_is_saved_to_its_end(
    bench: Bench, pool: Pool, llama: str, reference: list[list[int]]
) -> None:
    """As a prefill instance meets it: computed in several steps, over with its first token. Saves may withhold 3 blocks."""
    tight = {"num_gpu_blocks_override": 12, "max_model_len": 352, "max_num_batched_tokens": 96, "max_num_seqs": 4}
    engine = bench.engine(llama, connector(pool.address), **tight)
    first = engine.call("generate", prompts=prompts(46, 1), tokens=1)
    assert first["tokens"] == [reference[46][:1]]
    assert first["cached"] == [0]
    assert counted(first, "save_drops") == 0
    engine.call("settle")
    assert engine.call("reset"), "no block is held any more"
    check(engine.call("generate", prompts=prompts(46, 1)), 46, reference, cached=WHOLE)


def test_without_prefix_caching(bench: Bench, pool: Pool, llama: str, reference: list[list[int]]) -> None:
    engine = bench.engine(llama, connector(pool.address), enable_prefix_caching=False)
    computed_by(engine, 10, reference, count=2)
    check(engine.call("generate", prompts=prompts(10, 2)), 10, reference, cached=WHOLE)
