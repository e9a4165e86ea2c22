"""Loads against forward passes in flight: what vLLM's own scheduler hands out, and what our rule makes of it.

A load writes into blocks that others had before. These tests fail on the day vLLM frees blocks in another way.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from scheduler_world import BLOCK, CHUNK, loaded
from vllm_harness import require_vllm

if TYPE_CHECKING:
    from collections.abc import Callable

require_vllm()

END = 2
"""The token that ends an answer."""
DEPTHS = [pytest.param(1, 0, id="1"), pytest.param(2, 0, id="2"), pytest.param(3, 0, id="3"), pytest.param(2, 3, id="drafts")]


def live(
    world: Callable[..., Any], depth: int, drafts: int = 0, *, steps: int = 500, seed: int = 0, **more: Any
) -> Counter[str]:
    """A random life with `depth` steps in flight: answers that end, aborts, preemptions, resets, failures. What was seen.

    `more`: of the world, and `defer`: False takes away that vLLM keeps freed blocks back.
    """
    from in_flight_world import InFlight
    from vllm.v1.request import RequestStatus

    from vcache.integrations.vllm.metadata import LoadOutcome, SaveOutcome, VCacheWorkerMetadata

    defer = more.pop("defer", True)
    chance = random.Random(seed)
    w = world(blocks=60, batched=96, ahead=depth > 1, **more)
    w.side._policy = w.side._policy._replace(loads=True)  # as the child of a connector with another role
    if not defer:
        w.scheduler.defer_block_free = False
    engine = InFlight(w, drafts)
    scheduler = w.scheduler
    seen: Counter[str] = Counter(deferring=w.scheduler.defer_block_free)
    prefixes = [[chance.randrange(10, 900) for _ in range(160)] for _ in range(4)]
    under_way: dict[int, tuple[int, Any]] = {}
    names = 0
    for _ in range(steps):
        while len(scheduler.requests) < 10 and chance.random() < 0.6:
            names += 1
            prompt = chance.choice(prefixes)[: chance.randrange(20, 160)]
            prompt += [chance.randrange(10, 900) for _ in range(chance.randrange(1, 120))]
            request = w.add(f"r{names}", prompt, chance.randrange(1, 60))
            request.sampling_params.update_from_generation_config({}, END)
            request.sampling_params.ignore_eos = False
            w.publish(request, chance.choice([0, 0, 2, 4, 6]))
        if chance.random() < 0.04 and scheduler.requests:
            name = chance.choice(sorted(scheduler.requests))
            if not scheduler.requests[name].is_finished():
                scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
                seen["aborts"] += 1
        if chance.random() < 0.01:
            with suppress(RuntimeError):  # loads are under way, or blocks kept back: what runs is preempted all the same
                scheduler.reset_prefix_cache(reset_running_requests=True)
            seen["resets"] += 1
        p = engine.taken_in
        x = engine.schedule()
        seen["steps"] += 1
        seen["preemptions"] += len(x.output.preempted_req_ids or ())
        seen["raced"] += sum(bool(x.fresh & (engine.writes[j] | engine.reads[j])) for j in x.before)
        for _, job in under_way.values():
            assert not set(job.blocks) & x.fresh, "handed out while it is loaded"
            assert not set(job.blocks) & engine.writes[x.step], "written while it is loaded"
        for job in x.metadata.loads:
            blocks = set(job.blocks)
            assert not job.blocking
            assert blocks <= x.fresh
            seen["loads"] += 1
            seen["raced loads"] += any(blocks & engine.writes[j] for j in x.before)
            seen["wrong"] += any(blocks & engine.writes[j] for j in x.before if j >= job.after)
            seen["wrong if trusted"] += any(blocks & engine.writes[j] for j in x.before if j >= min(p + 1, x.step))
            # The output of a step is there before its drafter is done.
            drafted = any(engine.last_writer.get(block) == p for block in blocks) and p > 0
            seen["drafted"] += drafted
            seen["wrong behind a drafter"] += drafted and job.after <= p
            seen["waits for a forward pass"] += any(engine.writes[j] for j in x.before if j < job.after)
            under_way[job.job] = x.step + chance.randrange(0, 4), job
        if len(engine.flight) >= depth or not x.output.num_scheduled_tokens:
            oldest = engine.flight[0]
            tokens = {}
            for name in engine.sampling(oldest):
                drafted_tokens = len(oldest.output.scheduled_spec_decode_tokens.get(name, ()))
                tokens[name] = [chance.randrange(10, 900) for _ in range(1 + chance.randrange(0, drafted_tokens + 1))]
                if chance.random() < 0.05:
                    tokens[name][-1] = END
            report, bad = VCacheWorkerMetadata(), set()
            for number, (due, job) in list(under_way.items()):
                if due > oldest.step:
                    continue
                del under_way[number]
                good = len(job.digests)
                if chance.random() < 0.1:
                    good = chance.randrange(good)
                    bad |= set(job.blocks[(sum(job.tokens[:good]) - (job.skip if good else 0)) // BLOCK :])
                    seen["failures"] += 1
                report.loads[number] = LoadOutcome(1, good)
            for save in oldest.metadata.saves:
                report.saves[save.job] = SaveOutcome(1, True, False)
            engine.take_in(tokens, report, bad)
            assert w.side._steps._processed == engine.taken_in, "take_events is not called once for each step"
            assert w.side._steps.step == engine.step
    return seen


@pytest.mark.parametrize(("depth", "drafts"), DEPTHS)
def test_no_load_is_overwritten_and_none_waits_for_a_forward_pass(world: Callable[..., Any], depth: int, drafts: int) -> None:
    seen = live(world, depth, drafts)
    assert seen["loads"] > 20
    assert min(seen["aborts"], seen["resets"], seen["failures"], seen["preemptions"]) > 0
    assert bool(seen["deferring"]) == (depth > 1)
    assert seen["raced"] == seen["raced loads"] == seen["wrong"] == seen["wrong behind a drafter"] == 0
    assert seen["waits for a forward pass"] == 0
    assert depth == 1 or seen["drafted"] > 0, "or the last check says nothing"


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("why", [{"defer": False}, {"kv_role": "kv_producer"}], ids=["patched", "producer"])
def test_where_vllm_does_not_keep_freed_blocks_back_loads_wait_for_it(
    world: Callable[..., Any], depth: int, why: dict[str, Any]
) -> None:
    """Also the control of the test above: without vLLM's fence the same life does race."""
    seen = live(world, depth, **why)
    assert not seen["deferring"]
    assert seen["raced loads"] > 5
    assert seen["wrong if trusted"] > 5
    assert seen["wrong"] == seen["wrong behind a drafter"] == 0
    assert seen["waits for a forward pass"] > 5


def first_step(world: Callable[..., Any], depth: int, *, late: bool) -> tuple[int, list[int]]:
    """Of a request whose load begins in step K and lands right after the call that launched it: in K + what is it computed, and
    in the outputs of which steps, relative to K, it was told."""
    from in_flight_world import InFlight
    from worker_world import End, make_worker

    w = world(ahead=depth > 1)
    engine = InFlight(w)
    worker = make_worker(late=late)
    worker._namespace = w.side._names.namespace
    worker._store.loaded = 3
    worker._store.copies_beside = True
    w.connector._late = late
    reports: dict[int, Any] = {}
    told: list[int] = []
    began = 0

    def step() -> Any:
        """Schedule and launch, as vLLM does: the report is made when the step is launched, and read when it is taken in."""
        launched = engine.schedule()
        worker.begin_step(launched.metadata)
        names = worker.finished()
        reports[launched.step] = End(names, worker.bad_blocks(), worker.report())
        for loading in worker._store.under_way.values():
            loading.landed = True
        return launched

    def take_in() -> None:
        oldest = engine.flight[0].step
        names, bad, report = reports.pop(oldest)
        assert not bad
        settled = report.settled() if report is not None else None
        if began and (names or (settled is not None and settled.loads and late)):
            told.append(oldest - began)
        real = w.connector.update_connector_output

        def update(output: Any) -> None:
            output.finished_recving = names or None
            real(output)

        w.connector.update_connector_output = update
        engine.take_in(report=settled)
        w.connector.update_connector_output = real

    w.add("busy", range(10, 200), 500)
    while engine.step < 4:
        step()
        if len(engine.flight) >= depth:
            take_in()
    request = w.add("hit", range(300, 300 + 3 * CHUNK + 5))
    w.publish(request, 3)
    for _ in range(10):
        launched = step()
        if launched.metadata.loads:
            began = launched.step
        if began and "hit" in launched.output.num_scheduled_tokens:
            worker.close()
            return launched.step - began, told
        if len(engine.flight) >= depth:
            take_in()
    raise AssertionError("it was never computed")


@pytest.mark.parametrize(("depth", "steps", "told"), [(1, 1, 0), (2, 1, -1), (3, 1, -2)])
def test_a_load_that_lands_while_an_earlier_step_runs_is_told_with_that_step(
    world: Callable[..., Any], depth: int, steps: int, told: int
) -> None:
    """The object that is read when the step before is over was made before the load began."""
    assert first_step(world, depth, late=True) == (steps, [told])


@pytest.mark.parametrize(("depth", "steps"), [(1, 2), (2, 3), (3, 4)])
def test_without_late_reports_it_is_told_two_steps_later(world: Callable[..., Any], depth: int, steps: int) -> None:
    assert first_step(world, depth, late=False) == (steps, [1])


def test_a_hit_waits_behind_a_prompt_that_fills_every_step_and_the_wait_is_counted(world: Callable[..., Any]) -> None:
    """`--long-prefill-token-threshold` below the budget of a step lets it in at once."""
    waits = {}
    for threshold in (0, 48):
        w = world(blocks=300, batched=96)
        w.scheduler.scheduler_config.long_prefill_token_threshold = threshold
        w.add("long", [10 + number % 880 for number in range(640)])
        w.step()
        w.publish(w.add("hit", [20 + number % 870 for number in range(3 * CHUNK + 5)]), 3)
        waits[threshold] = 1
        while not (jobs := w.step().loads):
            waits[threshold] += 1
            assert waits[threshold] < 20
        w.step(**loaded(jobs[0]))
        assert w.counted.data["admissions"] == 1
        assert 0 < w.counted.data["admission_seconds"] < 100
    assert waits[48] == 1
    assert waits[0] > 5
