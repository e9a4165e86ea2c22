"""A worker's side with a store whose copies are in the test's hands. Needs vLLM, and no model."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, NamedTuple

from support.cluster import eventually
from vllm_harness import require_vllm

require_vllm()

BLOCKS = [4, 5, 6, 7]


class Loading:
    """`tiers.Loading`: its copy is under way until the test lets it land."""

    def __init__(self, store: Store, job: Any, within: float) -> None:
        self._store = store
        self._job = job
        self.within = within
        self.landed = False
        self.rest = False
        """Chunks are missing, and may be in storage."""

    def done(self) -> bool:
        return self.landed

    def has_rest(self) -> bool:
        return self.rest

    def result(self) -> Any:
        return SimpleNamespace(found=self._store.load(self._job))


class Store:
    """`jobs.ShardStore`, with results from the test."""

    def __init__(self) -> None:
        import torch

        self.target = SimpleNamespace(cache=SimpleNamespace(device=torch.device("cpu")))
        self.loaded: int | Exception = 2
        self.closed = False
        self.saved: Exception | None = None
        self.saves: list[Any] = []
        self.landing: dict[int, threading.Event] = {}
        self.broken_starts: dict[int, Exception] = {}
        self.broken_ends: dict[int, Exception] = {}
        self.left_storage = 0
        self.copies_beside = False
        self.under_way: dict[int, Loading] = {}
        """By job: loads that were started."""

    def broken(self, job: Any) -> tuple[bytes, ...]:
        return (b"b" * 16,) if self.loaded != 2 else ()

    def drop(self, digests: list[bytes]) -> None:
        self.saves.append(digests)

    def take_loaded_bytes(self) -> dict[str, int]:
        return {"vram": 3000, "dram": 1000}

    def leave_storage(self) -> None:
        self.left_storage += 1

    def load(self, job: Any) -> int:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded

    def start_load(self, job: Any, within: float) -> Loading:
        loading = self.under_way[job.job] = Loading(self, job, within)
        return loading

    def start_save(self, job: Any) -> Any:
        """Its copy is under way until the test lets it land."""
        from vcache.integrations.vllm.jobs import Saved, SaveUnderWay
        from vcache.integrations.vllm.metadata import SaveOutcome

        if isinstance(error := self.broken_starts.get(job.job), Exception):
            raise error
        self.saves.append(job.job)

        def finish() -> Saved:
            landing = self.landing.get(job.job)
            if landing is not None and not landing.wait(10):
                raise TimeoutError("the test did not let it land")
            if self.saved is not None:
                raise self.saved
            if isinstance(error := self.broken_ends.get(job.job), Exception):
                raise error
            return Saved(SaveOutcome(1, True, False), 4096, 0.5)

        landing = self.landing.get(job.job)
        return SaveUnderWay(lambda: landing is None or landing.is_set(), finish)

    def failed_blocks(self, job: Any, loaded: int) -> list[int]:
        from vcache.integrations.vllm.jobs import ShardStore

        return ShardStore.failed_blocks(self, job, loaded)  # type: ignore[arg-type]

    _block_size = 16

    def close(self) -> None:
        self.closed = True


def make_worker(**more: Any) -> Any:
    """A `WorkerSide` with a `Store`. `more`: its keywords, and `options` of `kv_connector_extra_config`."""
    from vcache.integrations.vllm.kv_group import KVGroup
    from vcache.integrations.vllm.settings import read_settings
    from vcache.integrations.vllm.worker import WorkerSide

    group = KVGroup(("0",), 16, 16, 1, 8, "float32", False, 64)
    settings = read_settings({"address": "unix:///nowhere", **more.pop("options", {})}, {})
    side = WorkerSide(None, group, bytes(16), 32, settings, **more)
    side._use(Store())  # type: ignore[arg-type]
    return side


def step(number: int, *jobs: Any, known: int = 0) -> Any:
    from vcache.integrations.vllm.metadata import LoadJob, VCacheMetadata

    loads = [job for job in jobs if isinstance(job, LoadJob)]
    return VCacheMetadata(number, known, loads=loads, saves=[job for job in jobs if not isinstance(job, LoadJob)])


def load(job: int = 1, *, blocking: bool = False, skip: int = 0) -> Any:
    from vcache.integrations.vllm.metadata import LoadJob

    return LoadJob(job, f"request {job}", [b"a" * 16, b"b" * 16], 0, [32, 32], skip, BLOCKS[skip // 16 :], blocking)


def save(job: int = 2, *, blocking: bool = False) -> Any:
    from vcache.integrations.vllm.metadata import SaveJob

    return SaveJob(job, "r", [b"c" * 16], b"", 2, [32], [8, 9], blocking)


def begin(worker: Any, metadata: Any) -> None:
    """What vLLM calls before the forward pass of a step."""
    worker.begin_step(metadata)
    worker.load_within(metadata)


def told(worker: Any) -> Any:
    """What the worker's report on a step says when it is read; None when that is nothing."""
    report = worker.report()
    return (report.settled() or None) if report is not None else None


class End(NamedTuple):
    """What vLLM hears at the end of a step."""

    names: set[str]
    bad: set[int]
    loads: dict[int, Any]
    """By job."""


def end(worker: Any, *, idle: bool = False) -> End:
    """What vLLM calls behind the forward pass of a step. Names are those of `load`, whichever way they are told."""
    names, bad, report = worker.finished(idle=idle), worker.bad_blocks(), told(worker)
    loads = report.loads if report is not None else {}
    if worker._late:
        assert not names
        names = {f"request {job}" for job in loads}
    return End(names, bad, loads)


def outcome(worker: Any) -> End:
    """What the worker tells in the step in which a load is over."""
    return eventually(lambda: (found := end(worker)).names and found, what="the end of the load")
