"""Loads beside the steps: when they start, when they are told, and what becomes of those that never end."""

from __future__ import annotations

import pickle
import threading
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from support.cluster import eventually
from worker_world import BLOCKS, begin, end, load, make_worker, outcome, save, step, told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def worker() -> Iterator[Any]:
    """Copies run beside the thread that starts them, as on a GPU."""
    side = make_worker()
    side._store.copies_beside = True
    yield side
    side.close()


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("vcache")}


# -- late reports --------------------------------------------------------------------------------------------------------


def test_what_lands_after_the_report_was_made_is_told_by_it_and_by_no_other(worker: Any) -> None:
    """Its step still runs when it is made. The report of the step before says it as well, when it is read later."""
    before = worker.report()
    begin(worker, step(2, load()))
    own, other = worker.report(), worker.report()
    assert before, "vLLM leaves out a report that is not true"
    worker._store.under_way[1].landed = True
    assert before.settled().loads == {1: (1, 2, ())}
    assert before.settled().loads == {1: (1, 2, ())}
    assert own.settled().loads == other.settled().loads == {}
    assert worker.finished() == set()


def test_a_report_that_is_pickled_says_what_has_landed_by_then(worker: Any) -> None:
    from vllm.v1.outputs import KVConnectorOutput

    from vcache.integrations.vllm.metadata import VCacheWorkerMetadata

    begin(worker, step(1, load(1), load(2)))
    output = KVConnectorOutput(kv_connector_worker_meta=worker.report())
    assert not output.is_empty()
    worker._store.under_way[1].landed = True
    wire = pickle.dumps(output)
    worker._store.under_way[2].landed = True
    report = pickle.loads(wire).kv_connector_worker_meta
    assert type(report) is VCacheWorkerMetadata
    assert list(report.loads) == [1]
    assert list(worker.report().settled().loads) == [2]


def test_reports_that_are_added_up_in_one_process_say_what_has_landed_by_then() -> None:
    one, two = make_worker(), make_worker()
    for each in (one, two):
        each._store.copies_beside = True
        begin(each, step(1, load()))
    reports = one.report(), two.report()
    for each in (one, two):
        each._store.under_way[1].landed = True
    assert reports[0].aggregate(reports[1]).loads == {1: (2, 2, ())}
    for each in (one, two):
        each.close()


def test_two_workers_are_counted_by_vllms_aggregator_and_by_the_scheduler() -> None:
    """One tells of its part a step before the other one, by way of another process; bad blocks of one come with its part."""
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    def over_the_wire(*workers: Any) -> Any:
        outputs = []
        for each in workers:
            names, bad = each.finished(), each.bad_blocks()
            made = KVConnectorOutput(
                finished_recving=names or None, invalid_block_ids=bad, kv_connector_worker_meta=each.report()
            )
            outputs.append(ModelRunnerOutput(req_ids=[], req_id_to_index={}, kv_connector_output=made))
        return KVOutputAggregator(2).aggregate([pickle.loads(pickle.dumps(each)) for each in outputs]).kv_connector_output

    one, two = make_worker(), make_worker()
    for each in (one, two):
        each._store.copies_beside = True
        begin(each, step(1, load()))
    one._store.under_way[1].landed = True
    first = over_the_wire(one, two)
    assert first.kv_connector_worker_meta.loads == {1: (1, 2, ())}
    two._store.loaded = 1
    two._store.under_way[1].landed = True
    second = over_the_wire(one, two)
    assert second.invalid_block_ids == {6, 7}
    assert second.kv_connector_worker_meta.loads == {1: (1, 1, (b"b" * 16,))}
    assert first.finished_recving is second.finished_recving is None
    assert not over_the_wire(one, two).kv_connector_worker_meta
    for each in (one, two):
        each.close()


def test_the_scheduler_tells_vllm_once_when_all_workers_have_a_load(world: Callable[..., Any]) -> None:
    from vllm.v1.outputs import KVConnectorOutput

    from vcache.integrations.vllm.metadata import LoadOutcome, VCacheWorkerMetadata

    w = world()
    w.side._policy = w.side._policy._replace(workers=2)
    request = w.add("r", range(10, 100))
    w.publish(request, 2)
    job = w.step().loads[0]
    for expected in (None, {"r"}, None):
        output = KVConnectorOutput(kv_connector_worker_meta=VCacheWorkerMetadata({job.job: LoadOutcome(1, 2)}))
        w.connector.update_connector_output(output)
        assert output.finished_recving == expected


def test_bad_blocks_are_never_behind_the_report_of_their_load(worker: Any) -> None:
    """vLLM looks at them when it begins to take in a step, and the report of the step before is read later than they are found:
    it would schedule the request, and then hear that its blocks are bad."""
    worker._store.loaded = 1
    before = worker.report()
    begin(worker, step(2, load(1), load(2)))
    worker._store.under_way[1].landed = True
    assert before.settled().loads == {}
    assert worker.finished() == set()
    assert worker.bad_blocks() == {6, 7}
    worker._store.under_way[2].landed = True
    own = worker.report()
    assert list(own.settled().loads) == [1]
    assert worker.bad_blocks() == {6, 7}
    assert list(worker.report().settled().loads) == [2]


def test_reports_read_in_another_thread_and_the_runner_tell_each_load_once() -> None:
    worker = make_worker()
    worker._store.copies_beside = True
    reports: deque[Any] = deque()
    found: list[int] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set() or reports:
            if reports:
                found.extend(reports.popleft().settled().loads)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 201):
        begin(worker, step(number, load(number)))
        worker._store.under_way[number].landed = True
        worker.finished()
        assert worker.bad_blocks() == set()
        reports.append(worker.report())
    stop.set()
    reader.join(10)
    found.extend(worker.report().settled().loads)
    assert sorted(found) == list(range(1, 201))
    worker.close()


@pytest.mark.parametrize(
    ("version", "late"),
    [
        ("0.25.9", False),
        ("0.26.0", True),
        ("0.32.0+cpu", True),
        ("0.33.1rc1", True),
        ("0.34.0", False),
        ("1.0", False),
        ("dev", False),
    ],
)
def test_only_versions_whose_order_was_seen_get_late_reports(version: str, late: bool) -> None:
    from vcache.integrations.vllm.versions import late_reports

    assert late_reports(version) == late


# -- threads, loads that never end ---------------------------------------------------------------------------------------


def test_many_loads_need_no_threads(worker: Any) -> None:
    known = threads()
    begin(worker, step(1, *(load(job) for job in range(1, 65))))
    assert len(worker._store.under_way) == 64
    assert threads() == known
    for loading in worker._store.under_way.values():
        loading.landed = True
    assert len(end(worker).names) == 64
    assert threads() == known


def test_on_a_cpu_they_need_as_many_as_it_says(worker: Any) -> None:
    worker._store.copies_beside = False
    known = threads()
    begin(worker, step(1, *(load(job) for job in range(1, 65))))
    found: set[str] = set()

    def all_told() -> bool:
        found.update(end(worker).names)
        return len(found) == 64

    eventually(all_told, what="all of them")
    assert len(threads() - known) <= 2


def test_a_load_that_never_ends_stops_nothing_else(
    worker: Any, monkeypatch: pytest.MonkeyPatch, caplog_vllm: pytest.LogCaptureFixture
) -> None:
    from vcache.integrations.vllm import worker as module

    monkeypatch.setattr(module, "END_WAIT", 0.05)
    begin(worker, step(1, load(1)))
    for number in range(2, 12):
        begin(worker, step(number, load(number), save(100 + number)))
        worker.start_saves(step(number, save(100 + number)))
        worker._store.under_way[number].landed = True
        assert end(worker, idle=True).names == {f"request {number}"}
    eventually(lambda: len(worker._store.saves) == 10, what="the saves")
    store = worker._store
    worker.close()
    assert "did not end within" in caplog_vllm.text
    assert not store.closed, "what the copy reads is not taken from under it"
    report = told(worker)
    assert report is None or 1 not in report.loads


def test_a_load_is_not_told_while_its_copy_may_still_land(worker: Any) -> None:
    begin(worker, step(1, load()))
    for _ in range(3):
        assert end(worker) == (set(), set(), {})
    worker._store.under_way[1].landed = True
    assert end(worker).names == {"request 1"}


def test_an_idle_engine_waits_for_a_load_and_hears_of_it_in_the_same_step(worker: Any) -> None:
    begin(worker, step(1, load()))
    lands = threading.Timer(0.01, lambda: setattr(worker._store.under_way[1], "landed", True))
    lands.start()
    eventually(lambda: end(worker, idle=True).names == {"request 1"}, what="the end of the load")
    lands.join()


def test_what_cannot_be_asked_any_more_is_bad(worker: Any) -> None:
    """A GPU that failed: looking at an event raises."""

    def fail() -> bool:
        raise RuntimeError("an illegal memory access was encountered")

    begin(worker, step(1, load(1), load(2)))
    worker._store.under_way[1].done = fail
    worker._store.under_way[2].landed = True
    first = end(worker)
    assert (first.names, first.bad) == ({"request 1", "request 2"}, set(BLOCKS))
    assert first.loads == {1: (1, 0, ()), 2: (1, 2, ())}
    assert worker.take_stats().data["errors"] == 1


def test_a_load_whose_start_breaks_is_bad(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: Any, within: float) -> None:
        raise TypeError("a mistake")

    monkeypatch.setattr(worker._store, "start_load", fail)
    begin(worker, step(1, load()))
    assert end(worker) == ({"request 1"}, set(BLOCKS), {1: (1, 0, ())})


# -- the manager, storage ------------------------------------------------------------------------------------------------


def test_the_loads_of_a_step_share_the_time_that_the_manager_gets(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped manager costs a step `lookup_deadline_ms`, however many loads it brings."""
    from vcache.integrations.vllm import loads as module

    now = 100.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now))
    start = worker._store.start_load

    def slow(job: Any, within: float) -> Any:
        nonlocal now
        now += min(within, 0.07)
        return start(job, within)

    monkeypatch.setattr(worker._store, "start_load", slow)
    begin(worker, step(1, *(load(job) for job in (1, 2, 3))))
    assert [round(each.within, 6) for each in worker._store.under_way.values()] == [0.1, 0.03]
    assert outcome(worker).names == {"request 3"}, "asks in a thread: nothing is lost where the manager is only slow"
    begin(worker, step(2, load(4)))
    assert worker._store.under_way[4].within == pytest.approx(0.1)
    for loading in worker._store.under_way.values():
        loading.landed = True


def test_what_storage_may_have_goes_on_in_a_thread_and_only_then(worker: Any) -> None:
    done_in: list[str] = []
    worker._store.load = lambda job: done_in.append(threading.current_thread().name) or 2
    begin(worker, step(1, load(1), load(2)))
    worker._store.under_way[2].rest = True
    for loading in worker._store.under_way.values():
        loading.landed = True
    assert outcome(worker).names >= {"request 1"}
    eventually(lambda: len(done_in) == 2, what="both")
    assert done_in[0] == threading.current_thread().name
    assert done_in[1].startswith("vcache-load")


# -- behind a step -------------------------------------------------------------------------------------------------------


class Gpu:
    """A stream that computes, and copies beside it, which run as soon as what they wait for has been computed."""

    def __init__(self) -> None:
        self.memory = dict.fromkeys(BLOCKS, "old")
        self._queued: deque[Callable[[], None]] = deque()
        self._given = 0
        self._done = 0
        self._copies: list[tuple[int, Callable[[], None]]] = []
        self._behind = 0

    def compute(self, work: Callable[[], None]) -> None:
        self._given += 1
        self._queued.append(work)

    def record(self) -> Any:
        place = self._given
        return SimpleNamespace(query=lambda: self._done >= place, place=place)

    @contextmanager
    def behind(self, event: Any) -> Iterator[None]:
        self._behind = event.place
        yield

    def copy(self, work: Callable[[], None]) -> None:
        self._copies.append((self._behind, work))
        self._settle()

    def run(self) -> None:
        """One piece of what was queued."""
        self._queued.popleft()()
        self._done += 1
        self._settle()

    def _settle(self) -> None:
        for copy in [copy for copy in self._copies if copy[0] <= self._done]:
            self._copies.remove(copy)
            copy[1]()

    def write(self, text: str) -> None:
        self.memory |= dict.fromkeys(BLOCKS, text)


@pytest.fixture
def gpu(worker: Any, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Under the worker: its loads copy into the GPU's memory."""
    from vcache.integrations.vllm.step_events import StepEvents

    gpu = Gpu()
    worker._events = StepEvents(gpu)
    start = worker._store.start_load

    def copy(job: Any, within: float) -> Any:
        loading = start(job, within)

        def land() -> None:
            gpu.write("loaded")
            loading.landed = True

        gpu.copy(land)
        return loading

    monkeypatch.setattr(worker._store, "start_load", copy)
    return gpu


@pytest.mark.parametrize(
    ("after", "late", "memory"),
    [
        (3, "forward pass 2", "loaded"),
        (2, "forward pass 2", "forward pass 2"),
        (2, "drafter 1", "loaded"),
        (1, "drafter 1", "drafter 1"),
    ],
)
def test_a_load_comes_after_the_steps_before_the_one_it_names(
    worker: Any, gpu: Gpu, after: int, late: str, memory: str
) -> None:
    """Two steps are in flight when step 3 brings the load; one of their parts still writes its blocks. The rule names step 3
    where vLLM does not keep freed blocks back, and step 2 where it does and the output of step 1 was taken in."""
    for number in (1, 2, 3):
        job = load()._replace(after=after)
        begin(worker, step(number, *([job] if number == 3 else [])))
        for part in (f"forward pass {number}", f"drafter {number}"):
            gpu.compute((lambda part=part: gpu.write(part)) if part == late else lambda: None)
        if number == 1:
            gpu.run()  # its output is there; its drafter still runs
    early = end(worker).names
    assert early == (set() if after > 1 else {"request 1"})
    for _ in range(5):
        gpu.run()
    assert end(worker).names | early == {"request 1"}
    assert gpu.memory == dict.fromkeys(BLOCKS, memory)


def test_a_load_that_waits_long_for_a_step_is_counted(worker: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from vcache.integrations.vllm import loads as module

    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now))
    gpu.compute(lambda: None)
    for number, passing in ((1, 5e-4), (2, 2e-3)):
        gpu.compute(lambda: None)
        begin(worker, step(number, load(number)._replace(after=number)))
        now += passing
        assert end(worker).names == set()
        while not worker._store.under_way[number].landed:
            gpu.run()
        assert end(worker).names == {f"request {number}"}
    assert worker.take_stats().data["load_waits"] == 1


def test_an_event_that_is_not_remembered_is_one_that_comes_later() -> None:
    from vcache.integrations.vllm.step_events import KEPT, StepEvents

    gpu = Gpu()
    events = StepEvents(gpu)
    for number in range(1, KEPT + 3):
        gpu.compute(lambda: None)
        events.record(number)
    assert [events.after(number).event.place for number in (1, 2, 3, KEPT + 2)] == [KEPT + 2, KEPT + 2, 3, KEPT + 2]
    assert StepEvents(gpu).after(1).event.place == KEPT + 2, "none was recorded: now"
    assert StepEvents(None).after(1).over()


# -- saves ---------------------------------------------------------------------------------------------------------------


def test_saves_of_a_later_step_start_and_end_before_those_of_an_earlier_one(worker: Any) -> None:
    """They waited in a thread each, or behind the first."""
    store = worker._store
    store.landing = {2: threading.Event(), 3: threading.Event()}
    worker.start_saves(step(1, save(2)))
    metadata = step(2, save(3), save(4))
    metadata.broken = [b"b" * 16]
    begin(worker, metadata)
    worker.start_saves(metadata)
    assert list(eventually(lambda: told(worker), what="the one that lands").saves) == [4]
    assert store.saves == [2, [b"b" * 16], 3, 4]
    store.landing[3].set()
    assert list(eventually(lambda: told(worker)).saves) == [3]
    store.landing[2].set()
    assert list(eventually(lambda: told(worker)).saves) == [2]
    assert [name for name in threads() if name.startswith("vcache-save")] == ["vcache-save"]
