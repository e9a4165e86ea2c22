"""Prefill and decode apart on real engines: a `kv_producer` that only saves, a `kv_consumer` that only loads, one pool between.

Tokens are compared to those of an engine without a connector. Every test has prompts of its own, which nobody knows before.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from shared_engines import LENGTH, WHOLE, Pool, check, computed_by, counted, prompts
from support.cluster import eventually
from tiny_models import prompt
from vllm_harness import CHUNK, START, EngineProcess, connector, require_vllm

from vcache import VCacheConfig
from vcache.manager.connect import connect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vcache.manager.client import Manager

require_vllm()
pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]


class Apart(NamedTuple):
    producer: EngineProcess
    """Lends the memory; prefills in pieces of 96 tokens, so that a prompt is saved in several steps."""
    consumer: EngineProcess
    """Lends nothing, so that what it loads lies in the producer's memory. Waits as long as a consumer does by default."""
    manager: Manager

    def chunks(self) -> int:
        """Chunks in the pool, of whomever."""
        return self.manager.stats().gauges["chunks"]

    def misses(self) -> int:
        """Chunks that somebody looked up in vain."""
        return self.manager.stats().counters["misses"]


@pytest.fixture(scope="module")
def apart(folder: Path, llama: str) -> Iterator[Apart]:
    """Both engines, started at the same time, in a pool of their own: its counters are theirs alone."""
    own = folder / "apart"
    own.mkdir()
    with ExitStack() as stack:
        pool = Pool(own)
        stack.callback(pool.kill)
        producer, consumer = EngineProcess(own, "producer"), EngineProcess(own, "consumer")
        for engine in (producer, consumer):
            stack.callback(engine.kill)
        producer.send("start", model=llama, connector=connector(pool.address, "kv_producer"), max_num_batched_tokens=96)
        lends_nothing = connector(pool.address, "kv_consumer", **{"segment.lend": False})
        consumer.send("start", model=llama, connector=lends_nothing)
        for engine in (producer, consumer):
            engine.answer(START)
        config = VCacheConfig.from_env({}, manager={"address": pool.address})
        manager = stack.enter_context(closing(connect(config, name="test", role="tool", require=True)))
        yield Apart(producer, consumer, manager)


def loaded_nothing(result: dict[str, Any]) -> bool:
    names = ("vcache_lookups", "vcache_hit_tokens", "vcache_loads", "vcache_load_tokens", "external_prefix_cache_hits")
    return not any(result["counters"].get(f"vllm:{name}", 0) for name in names)


def test_what_the_producer_computes_the_consumer_loads(reference: list[list[int]], apart: Apart) -> None:
    before = apart.chunks()
    computed_by(apart.producer, 0, reference)
    assert apart.chunks() - before == 3 * WHOLE // CHUNK, "whole chunks, all of them"
    result = apart.consumer.call("generate", prompts=prompts(0))
    check(result, 0, reference, cached=WHOLE)
    assert counted(result, "hit_tokens") == counted(result, "load_tokens") == 3 * WHOLE > 0
    assert counted(result, "load_failures") == 0


def test_the_producer_never_loads(reference: list[list[int]], apart: Apart) -> None:
    """It computes again what lies in its own memory; the consumer shows that it could be loaded."""
    computed_by(apart.producer, 4, reference)
    there = apart.chunks()
    assert apart.producer.call("reset"), "its own prefix cache would answer otherwise"
    again = apart.producer.call("generate", prompts=prompts(4))
    check(again, 4, reference, cached=0)
    assert loaded_nothing(again)
    apart.producer.call("settle")
    assert apart.chunks() == there, "nothing is stored twice"
    check(apart.consumer.call("generate", prompts=prompts(4)), 4, reference, cached=WHOLE)


def test_the_consumer_never_saves(reference: list[list[int]], apart: Apart) -> None:
    """What only the consumer computed is in nobody's pool, neither for the manager nor for a look-up."""
    before = apart.chunks()
    for _ in range(2):
        result = apart.consumer.call("generate", prompts=prompts(8, 2))
        check(result, 8, reference, cached=0)
        assert counted(result, "lookups") > 2, "it asks again for a while before it computes"
        apart.consumer.call("settle")
        assert apart.chunks() == before
        assert apart.consumer.call("reset")
    # The same prompts count once they come from a producer.
    computed_by(apart.producer, 8, reference, count=2)
    assert apart.chunks() - before == 2 * WHOLE // CHUNK
    after = apart.consumer.call("generate", prompts=prompts(8, 2))
    check(after, 8, reference, cached=WHOLE)
    assert counted(after, "saves") == counted(result, "saves") == 0


def test_another_end_of_a_prompt_gets_other_tokens(reference: list[list[int]], apart: Apart) -> None:
    """Only the chunks before the difference are loaded, and the end shows in the tokens."""
    computed_by(apart.producer, 12, reference, count=1)
    other = prompt(12, LENGTH)[: 2 * CHUNK + 5] + prompt(13, LENGTH)[2 * CHUNK + 5 :]
    got = apart.consumer.call("generate", prompts=[other])
    assert got["cached"] == [2 * CHUNK]
    assert got["tokens"] != reference[12:13]
    assert apart.producer.call("reset")
    want = apart.producer.call("generate", prompts=[other])
    assert loaded_nothing(want)
    assert got["tokens"] == want["tokens"]


def test_asked_before_the_producer_began_the_consumer_waits_or_recomputes(reference: list[list[int]], apart: Apart) -> None:
    """Right tokens in both cases. A slow machine may be too late for some prompts, not for all of them."""

    def waited(seed: int) -> bool:
        before = apart.misses()
        apart.consumer.send("generate", prompts=prompts(seed, 1))
        try:
            eventually(lambda: apart.misses() > before, what="the consumer has asked in vain")
            computed_by(apart.producer, seed, reference, count=1)
        finally:  # an answer that nobody took would be the next test's
            result = apart.consumer.answer(60)
        check(result, seed, reference)
        assert counted(result, "lookups") > 1, "it asked again"
        assert counted(result, "load_failures") == 0
        return bool(result["cached"] == [WHOLE])

    assert any(waited(seed) for seed in range(14, 40))


def test_asked_at_the_same_time(reference: list[list[int]], apart: Apart) -> None:
    """Whatever the consumer finds while the producer still saves are whole chunks, and right; later it finds all."""
    for engine in (apart.consumer, apart.producer):
        engine.send("generate", prompts=prompts(40, 6))
    computed, result = (engine.answer(60) for engine in (apart.producer, apart.consumer))
    check(computed, 40, reference, cached=0)
    check(result, 40, reference)
    assert counted(result, "load_failures") == 0
    assert counted(result, "load_tokens") == sum(result["cached"])
    assert {cached % CHUNK for cached in result["cached"]} == {0}
    apart.producer.call("settle")
    assert apart.consumer.call("reset")
    check(apart.consumer.call("generate", prompts=prompts(40, 6)), 40, reference, cached=WHOLE)


def test_control_without_verification_wrong_bytes_show(reference: list[list[int]], apart: Apart) -> None:
    """The consumer's tokens come from what it loads: from other bytes come other tokens."""
    computed_by(apart.producer, 46, reference, count=2)
    assert apart.producer.call("garble") > 2**20
    apart.consumer.call("blind")
    wrong = apart.consumer.call("generate", prompts=prompts(46, 2))
    apart.consumer.call("blind", on=False)
    assert wrong["cached"] == [WHOLE] * 2
    for seed, tokens in zip((46, 47), wrong["tokens"], strict=True):
        assert tokens != reference[seed]
    assert apart.consumer.call("reset")
    right = apart.consumer.call("generate", prompts=prompts(46, 2))
    check(right, 46, reference)
    assert counted(right, "load_failures") == 2
