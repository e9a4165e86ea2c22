"""A worker's side without vLLM's model: whatever becomes of a transfer, the scheduler hears of it and no wrong byte counts."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from support.cluster import eventually
from worker_world import BLOCKS, Store, begin, load, make_worker, outcome, save, step, told

if TYPE_CHECKING:
    from collections.abc import Iterator


class OutOfResources(Exception):
    """Neither ours nor the system's, nor a RuntimeError: as Triton has several."""


@pytest.fixture(params=[True, False], ids=["late", "plain"])
def worker(request: pytest.FixtureRequest) -> Iterator[Any]:
    side = make_worker(late=request.param)
    yield side
    side.close()


def test_loaded_bytes_are_told_once() -> None:
    from vcache.integrations.vllm.jobs import ShardStore
    from vcache.metrics import EngineMetrics

    metrics = EngineMetrics()
    store = ShardStore(None, SimpleNamespace(metrics=metrics), 16)  # type: ignore[arg-type]
    metrics.observe("retrieve", "dram", 0.1, 100)
    assert store.take_loaded_bytes() == {"dram": 100}
    metrics.observe("retrieve", "dram", 0.1, 20)
    metrics.observe("retrieve", "vram", 0.1, 3)
    metrics.observe("store", "vram", 0.1, 4)
    assert store.take_loaded_bytes() == {"dram": 20, "vram": 3}
    assert store.take_loaded_bytes() == {"dram": 0, "vram": 0}


def test_a_good_load(worker: Any) -> None:
    begin(worker, step(1, load()))
    assert outcome(worker) == ({"request 1"}, set(), {1: (1, 2, ())})
    stats = worker.take_stats().data
    assert stats["load_tokens"] == 64
    assert (stats["load_bytes_vram"], stats["load_bytes_dram"], stats["load_bytes_storage"]) == (3000, 1000, 0)


@pytest.mark.parametrize(
    ("loaded", "skip", "bad"),
    [
        (0, 0, {4, 5, 6, 7}),
        (1, 0, {6, 7}),
        (0, 16, {5, 6, 7}),
        (1, 16, {6, 7}),
        (OSError("the lender is gone"), 0, {4, 5, 6, 7}),
    ],
)
def test_blocks_from_the_first_bad_chunk_on_are_reported(worker: Any, loaded: Any, skip: int, bad: set[int]) -> None:
    worker._store.loaded = loaded
    begin(worker, step(1, load(skip=skip)))
    names, blocks, loads = outcome(worker)
    assert (names, blocks) == ({"request 1"}, bad)
    assert loads[1].chunks == (loaded if isinstance(loaded, int) else 0)


@pytest.mark.parametrize("error", [TypeError("a mistake"), OutOfResources("shared memory")])
def test_an_error_of_any_kind_is_a_failed_load(worker: Any, caplog_vllm: pytest.LogCaptureFixture, error: Exception) -> None:
    worker._store.loaded = error
    begin(worker, step(1, load()))
    assert outcome(worker) == ({"request 1"}, set(BLOCKS), {1: (1, 0, ())})
    eventually(lambda: "not foreseen" in caplog_vllm.text, what="the log")
    assert worker.take_stats().data["errors"] == 1


def test_an_error_of_any_kind_within_a_step_does_not_reach_the_engine(worker: Any) -> None:
    """Only three kinds were caught: any other one ended the engine from within `start_load_kv`."""
    worker._store.loaded = OutOfResources("shared memory")
    begin(worker, step(3, load(blocking=True)))
    assert worker.finished() == set()
    assert worker.bad_blocks() == set(BLOCKS)
    report = told(worker)
    assert (report.loads, report.failed_step) == ({1: (1, 0, ())}, 3)


def test_an_error_while_the_store_is_opened_turns_the_worker_off_and_it_says_so_once(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any kind: no kernel could be compiled, say. It went up to vLLM and ended the engine."""
    from vcache.integrations.vllm import worker as module

    def fail(*_: Any) -> None:
        raise OutOfResources("shared memory")

    monkeypatch.setattr(module, "this_rank", fail)
    for _ in range(2):
        worker.register({})
    assert told(worker).off == 1
    worker.start_saves(step(1, save()))
    report = told(worker)
    assert (report.saves[2].dropped, report.off) == (True, 0)
    monkeypatch.setattr(module, "this_rank", lambda group: worker._rank)
    monkeypatch.setattr(worker, "_open", lambda caches: Store())
    worker.register({})
    assert told(worker).off == -1


class NoStream:
    """A side stream whose GPU failed."""

    def __init__(self, *, events: bool) -> None:
        self._events = events

    def record(self) -> Any:
        if not self._events:
            raise OutOfResources("no event")
        return SimpleNamespace(query=lambda: True)

    def behind(self, event: Any) -> Any:
        raise OutOfResources("no stream")


@pytest.mark.parametrize("events", [True, False])
def test_work_that_cannot_follow_the_stream_is_reported_too(worker: Any, events: bool) -> None:
    """A CUDA error in the thread before the work began, or in the runner's: blocks stayed held, and the request waited for
    ever."""
    from vcache.integrations.vllm.step_events import StepEvents

    worker._save_stream = stream = NoStream(events=events)
    worker._events = StepEvents(stream)
    worker._store.copies_beside = True
    begin(worker, step(1, load()))
    assert outcome(worker) == ({"request 1"}, set(BLOCKS), {1: (1, 0, ())})
    worker.start_saves(step(1, save(2), save(3)))
    saves: dict[int, Any] = {}

    def all_reported() -> bool:
        report = told(worker)
        saves.update(report.saves if report else {})
        return len(saves) == 2

    eventually(all_reported, what="both")
    assert all(each.dropped for each in saves.values())
    assert worker._store.saves == []
    assert not worker._loads.busy


def test_work_whose_thread_cannot_be_started_is_reported_once(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        worker.start_saves(step(1, save()))
    assert told(worker).saves[2].dropped
    worker.start_saves(step(2, save(3)))
    assert list(eventually(lambda: told(worker)).saves) == [3]
    assert worker._store.saves == [3]


def test_blocks_behind_the_last_chunk_are_reported_as_not_loaded(worker: Any) -> None:
    begin(worker, step(1, load()._replace(blocks=[*BLOCKS, 8])))
    assert outcome(worker) == ({"request 1"}, {8}, {1: (1, 2, ())})
    worker._store.loaded = 0
    begin(worker, step(1, load()._replace(digests=[], tokens=[], blocks=[4])))
    assert outcome(worker)[1] == {4}


def test_a_worker_of_another_namespace_takes_no_part(worker: Any) -> None:
    """Weights that were exchanged while the engine started: the names of one are not for what the other computes."""
    store, metadata = worker._store, step(1, load(), save())
    metadata.namespace = bytes(16)
    begin(worker, metadata)
    assert outcome(worker)[1] == set()
    metadata.namespace = b"another" + bytes(9)
    begin(worker, metadata)
    worker.start_saves(metadata)
    assert store.closed
    assert store.saves == []
    report = eventually(lambda: told(worker))
    assert (report.off, report.saves[2].dropped) == (1, True)
    assert worker.bad_blocks() == set(BLOCKS)


@pytest.mark.parametrize("late", [True, False])
def test_a_worker_that_declined_answers_all_the_same(caplog_vllm: pytest.LogCaptureFixture, late: bool) -> None:
    """The scheduler's side had decided otherwise: its blocks stayed held, its requests waited, and an idle engine never came
    to rest."""
    from vcache.integrations.vllm.declined import DeclinedWorker

    worker = DeclinedWorker("a reason", late=late)
    begin(worker, step(0))
    assert told(worker) is None
    assert caplog_vllm.text == "", "the scheduler's side declined as well, and said so"
    for number in (1, 2):
        begin(worker, step(number, load(1), load(5, blocking=True)))
        worker.start_saves(step(number, save()))
        assert worker.finished() == (set() if late else {"request 1"})
        assert worker.finished() == set()
        assert worker.bad_blocks() == set(BLOCKS)
        assert worker.bad_blocks() == set()
        report = told(worker)
        assert report.loads == {1: (1, 0, ()), 5: (1, 0, ())}
        assert report.saves == {2: (1, False, True)}
        assert (report.failed_step, report.off) == (number, number == 1)
        assert told(worker) is None
    assert caplog_vllm.text.count("a reason") == 1


def test_what_vllm_wakes_up_with_is_what_it_had(one_layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.33 calls `restore_kv_caches()` without tensors: a TypeError on wake-up."""
    from vcache.integrations.vllm.connector import VCacheConnector

    registered: list[Any] = []
    connector = object.__new__(VCacheConnector)
    connector._worker = SimpleNamespace(register=registered.append, unregister=lambda: registered.append("slept"))  # type: ignore[assignment]
    connector.register_kv_caches({"layer": 1})  # type: ignore[dict-item]
    connector.unregister_kv_caches()
    connector.restore_kv_caches()
    connector.restore_kv_caches({"layer": 2})  # type: ignore[dict-item]
    assert registered == [{"layer": 1}, "slept", {"layer": 1}, {"layer": 2}]


def test_nothing_computed_from_a_failed_load_is_saved(worker: Any) -> None:
    worker._store.loaded = 1
    begin(worker, step(5, load(blocking=True)))
    assert worker.bad_blocks() == {6, 7}
    worker.start_saves(step(5, save(2)))
    report = told(worker)
    assert report.failed_step == 5
    assert report.saves[2].dropped
    worker.start_saves(step(6, save(3), known=0))  # scheduled before the scheduler heard of it
    assert told(worker).saves[3].dropped
    worker.start_saves(step(7, save(4), known=5))
    assert not eventually(lambda: told(worker)).saves[4].dropped
    assert worker._store.saves == [4]


def test_what_failed_verification_is_reported_and_dropped_before_the_next_save(worker: Any) -> None:
    worker._store.loaded = 1
    begin(worker, step(5, load()))
    assert outcome(worker).loads == {1: (1, 1, (b"b" * 16,))}
    metadata = step(6, save(3))
    metadata.broken = [b"b" * 16]
    begin(worker, metadata)  # in a step without a forward pass, vLLM 0.26 does not call the other
    worker.start_saves(metadata)
    eventually(lambda: told(worker))
    assert worker._store.saves == [[b"b" * 16], 3]


def test_storage_is_left_when_the_scheduler_says_so(worker: Any) -> None:
    begin(worker, step(1))
    assert worker._store.left_storage == 0
    metadata = step(2)
    metadata.storage = False
    begin(worker, metadata)
    assert worker._store.left_storage == 1


def test_a_save_that_breaks_is_reported_or_its_blocks_would_be_held_forever(worker: Any) -> None:
    worker._store.saved = RuntimeError("out of memory")
    worker.start_saves(step(1, save()))
    assert eventually(lambda: told(worker)).saves[2].dropped


def test_all_saves_of_a_step_are_started_before_one_is_waited_for_and_each_is_reported_when_it_is_over(worker: Any) -> None:
    store = worker._store
    store.landing = {3: threading.Event(), 4: threading.Event()}
    worker.start_saves(step(1, save(3), save(4), save(2)))
    assert list(eventually(lambda: told(worker), what="the one that has landed").saves) == [2]
    assert store.saves == [3, 4, 2]
    assert told(worker) is None
    for job, landed in store.landing.items():
        landed.set()
        assert list(eventually(lambda: told(worker), what="the next one").saves) == [job]
    stats = worker.take_stats().data
    assert (stats["saves"], stats["save_bytes"], stats["save_seconds"]) == (3, 3 * 4096, 1.5)


@pytest.mark.parametrize("error", [OSError("the lender is gone"), TypeError("a mistake")])
@pytest.mark.parametrize("when", ["broken_starts", "broken_ends"])
@pytest.mark.parametrize("landed", [True, False])
def test_one_save_that_breaks_does_not_lose_the_report_of_another(
    worker: Any, when: str, error: Exception, landed: bool
) -> None:
    store = worker._store
    setattr(store, when, {3: error})
    if not landed:
        store.landing = {job: threading.Event() for job in (2, 3, 4)}
    worker.start_saves(step(1, save(2), save(3), save(4)))
    for event in store.landing.values():
        event.set()
    found: dict[int, bool] = {}

    def all_reported() -> bool:
        report = told(worker)
        found.update({job: saved.dropped for job, saved in report.saves.items()} if report else {})
        return len(found) == 3

    eventually(all_reported, what="three reports")
    assert found == {2: False, 3: True, 4: False}
    assert worker.take_stats().data["save_drops"] == 1


def test_saves_whose_blocks_nobody_holds_are_waited_for(worker: Any) -> None:
    store = worker._store
    store.landing = {3: threading.Event()}
    runner = threading.Thread(target=worker.start_saves, args=(step(1, save(2, blocking=True), save(3, blocking=True)),))
    runner.start()
    eventually(lambda: store.saves == [2, 3], what="the start of both")
    assert runner.is_alive()
    store.landing[3].set()
    runner.join(10)
    assert not runner.is_alive()
    assert set(told(worker).saves) >= {3}


def test_a_step_in_which_nothing_happens_makes_nothing(worker: Any) -> None:
    """What the worker counts in is not replaced, and nothing that the runner gets is shared with it or with another step."""
    stats, loaded, failed = worker._stats, worker._loaded, worker._failed
    begin(worker, step(1))
    worker.start_saves(step(1))
    one, two = worker.finished(), worker.finished(idle=True)
    assert one == two == worker.bad_blocks() == set()
    assert len({id(each) for each in (one, two, loaded)}) == 3
    assert told(worker) is worker.take_stats() is None
    assert (worker._stats, worker._loaded, worker._failed) == (stats, loaded, failed)
    assert worker._stats is stats


def test_without_a_store_everything_fails_and_nothing_hangs(worker: Any) -> None:
    worker._store = None
    begin(worker, step(1, load()))
    worker.start_saves(step(1, save()))
    assert worker.finished() == (set() if worker._late else {"request 1"})
    assert worker.bad_blocks() == set(BLOCKS)
    report = told(worker)
    assert report.saves[2].dropped
    assert report.loads == {1: (1, 0, ())}


def test_a_worker_that_another_one_saves_for(worker: Any) -> None:
    worker._rank = worker._rank._replace(saves=False)
    worker.start_saves(step(1, save()))
    assert told(worker).saves[2] == (1, True, False)
    assert worker._store.saves == []


def test_reports_of_two_workers_add_up() -> None:
    from vcache.integrations.vllm.metadata import LoadOutcome, SaveOutcome, VCacheWorkerMetadata

    one = VCacheWorkerMetadata(
        {1: LoadOutcome(1, 3, (b"x",)), 6: LoadOutcome(1, 0, (b"y",))}, {2: SaveOutcome(1, True, False)}, 4
    )
    two = VCacheWorkerMetadata({1: LoadOutcome(1, 2, (b"x", b"z")), 5: LoadOutcome(1, 1)}, {2: SaveOutcome(1, False, False)}, 3)
    total = one.aggregate(two)
    assert total.loads == {1: (2, 2, (b"x", b"z")), 5: (1, 1, ()), 6: (1, 0, (b"y",))}
    assert total.saves == {2: (2, False, False)}
    assert total.failed_step == 4


def test_layers_that_share_a_tensor_are_stored_once() -> None:
    import torch

    from vcache.integrations.vllm.jobs import own_caches
    from vcache.integrations.vllm.kv_group import KVGroup

    one, other = torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16, 16)
    group = KVGroup(("l0", "l1", "l2", "elsewhere"), 16, 16, 1, 8, "float32", False, 64)
    found = own_caches({"l0": one, "l1": one, "l2": other, "not ours": other}, group)
    assert list(found) == ["l0", "l2"]


@pytest.mark.parametrize("mla", [False, True])
def test_every_worker_has_its_shard_and_mla_is_saved_once(mla: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pipeline stages of two tensor-parallel workers each."""

    from vllm.distributed import parallel_state

    from vcache.integrations.vllm.jobs import this_rank
    from vcache.integrations.vllm.kv_group import KVGroup

    group = KVGroup(("l0",), 16, 16, 1, 8, "float32", mla, 64)
    found = {}
    for stage in range(2):
        for rank in range(2):
            tensor, pipeline = SimpleNamespace(rank_in_group=rank, world_size=2), SimpleNamespace(rank_in_group=stage)
            monkeypatch.setattr(parallel_state, "get_tp_group", lambda tensor=tensor: tensor)
            monkeypatch.setattr(parallel_state, "get_pp_group", lambda pipeline=pipeline: pipeline)
            found[stage, rank] = this_rank(group)
    if mla:
        assert found == {(0, 0): (0, True), (0, 1): (0, False), (1, 0): (1, True), (1, 1): (1, False)}
    else:
        assert found == {(0, 0): (0, True), (0, 1): (1, True), (1, 0): (2, True), (1, 1): (3, True)}
