"""A worker's side without vLLM's model: whatever becomes of a transfer, the scheduler hears of it and no wrong byte counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.cluster import eventually
from vllm_harness import require_vllm

if TYPE_CHECKING:
    from collections.abc import Iterator

require_vllm()

BLOCKS = [4, 5, 6, 7]


class Store:
    """`store.ShardStore`, with results from the test."""

    def __init__(self) -> None:
        import torch

        self.cache = type("Cache", (), {"device": torch.device("cpu")})
        self.loaded: int | Exception = 2
        self.saved: Exception | None = None
        self.saves: list[int] = []

    def load(self, job: Any) -> int:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded

    def save(self, job: Any) -> Any:
        from vcache.integrations.vllm.metadata import SaveOutcome

        if self.saved is not None:
            raise self.saved
        self.saves.append(job.job)
        return SaveOutcome(1, True, False), 4096

    def failed_blocks(self, job: Any, loaded: int) -> list[int]:
        from vcache.integrations.vllm.store import ShardStore

        return ShardStore.failed_blocks(self, job, loaded)  # type: ignore[arg-type]

    _block_size = 16

    def close(self) -> None:
        pass


@pytest.fixture
def worker() -> Iterator[Any]:
    from vcache.integrations.vllm.group import KVGroup
    from vcache.integrations.vllm.settings import read_settings
    from vcache.integrations.vllm.worker import WorkerSide

    group = KVGroup(("0",), 16, 16, 1, 8, "float32", False, 64)
    side = WorkerSide(None, group, bytes(16), 32, read_settings({"address": "unix:///nowhere"}, {}))
    side._store = Store()
    yield side
    side.close()


def step(number: int, *jobs: Any, known: int = 0) -> Any:
    from vcache.integrations.vllm.metadata import LoadJob, VCacheMetadata

    loads = [job for job in jobs if isinstance(job, LoadJob)]
    return VCacheMetadata(number, known, loads=loads, saves=[job for job in jobs if not isinstance(job, LoadJob)])


def load(job: int = 1, *, blocking: bool = False, skip: int = 0) -> Any:
    from vcache.integrations.vllm.metadata import LoadJob

    return LoadJob(job, f"request {job}", [b"a" * 16, b"b" * 16], 0, [32, 32], skip, BLOCKS[skip // 16 :], blocking)


def save(job: int = 2) -> Any:
    from vcache.integrations.vllm.metadata import SaveJob

    return SaveJob(job, "r", [b"c" * 16], b"", 2, [32], [8, 9], False)


def outcome(worker: Any) -> tuple[set[str], set[int], Any]:
    """What the worker reports once something has ended."""
    report = eventually(worker.report, what="a report")
    finished = eventually(lambda: (found := worker.finished()).loaded and found, what="the end of the load")
    return finished.loaded, finished.bad_blocks, report.loads


def test_a_good_load(worker: Any) -> None:
    worker.start_loads(step(1, load()))
    assert outcome(worker) == ({"request 1"}, set(), {1: (1, 2)})
    assert worker.take_stats().data["load_tokens"] == 64


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
    worker.start_loads(step(1, load(skip=skip)))
    names, blocks, loads = outcome(worker)
    assert (names, blocks) == ({"request 1"}, bad)
    assert loads[1].chunks == (loaded if isinstance(loaded, int) else 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_even_an_error_in_our_own_code_is_a_failed_load(worker: Any, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logging.getLogger("vllm.vcache").addHandler(caplog.handler)
    worker._store.loaded = TypeError("a mistake")
    worker.start_loads(step(1, load()))
    assert outcome(worker) == ({"request 1"}, set(BLOCKS), {1: (1, 0)})
    eventually(lambda: "not foreseen" in caplog.text, what="the log")


def test_nothing_computed_from_a_failed_load_is_saved(worker: Any) -> None:
    worker._store.loaded = 1
    worker.start_loads(step(5, load(blocking=True)))
    assert worker.finished().bad_blocks == {6, 7}
    worker.start_saves(step(5, save(2)))
    report = worker.report()
    assert report.failed_step == 5
    assert report.saves[2].dropped
    worker.start_saves(step(6, save(3), known=0))  # scheduled before the scheduler heard of it
    assert worker.report().saves[3].dropped
    worker.start_saves(step(7, save(4), known=5))
    assert not eventually(worker.report).saves[4].dropped
    assert worker._store.saves == [4]


def test_a_save_that_breaks_is_reported_or_its_blocks_would_be_held_forever(worker: Any) -> None:
    worker._store.saved = RuntimeError("out of memory")
    worker.start_saves(step(1, save()))
    assert eventually(worker.report).saves[2].dropped


def test_without_a_store_everything_fails_and_nothing_hangs(worker: Any) -> None:
    worker._store = None
    worker.start_loads(step(1, load()))
    worker.start_saves(step(1, save()))
    report = eventually(worker.report)
    assert report.saves[2].dropped
    eventually(lambda: worker.finished().bad_blocks == set(BLOCKS) or report.loads, what="the failed load")


def test_a_worker_that_another_one_saves_for(worker: Any) -> None:
    worker._rank = worker._rank._replace(saves=False)
    worker.start_saves(step(1, save()))
    assert worker.report().saves[2] == (1, True, False)
    assert worker._store.saves == []


def test_reports_of_two_workers_add_up() -> None:
    from vcache.integrations.vllm.metadata import LoadOutcome, SaveOutcome, VCacheWorkerMetadata

    one = VCacheWorkerMetadata({1: LoadOutcome(1, 3)}, {2: SaveOutcome(1, True, False)}, 4)
    two = VCacheWorkerMetadata({1: LoadOutcome(1, 2), 5: LoadOutcome(1, 1)}, {2: SaveOutcome(1, False, False)}, 3)
    total = one.aggregate(two)
    assert total.loads == {1: (2, 2), 5: (1, 1)}
    assert total.saves == {2: (2, False, False)}
    assert total.failed_step == 4


def test_layers_that_share_a_tensor_are_stored_once() -> None:
    import torch

    from vcache.integrations.vllm.group import KVGroup
    from vcache.integrations.vllm.store import own_caches

    one, other = torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16, 16)
    group = KVGroup(("l0", "l1", "l2", "elsewhere"), 16, 16, 1, 8, "float32", False, 64)
    found = own_caches({"l0": one, "l1": one, "l2": other, "not ours": other}, group)
    assert list(found) == ["l0", "l2"]
