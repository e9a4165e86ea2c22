"""Loads beside the steps: started in the step that brings them, without a thread each, and seen to land by looking."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from ...cache.tiers import Loading
from .jobs import ShardStore
from .metadata import LoadJob, LoadOutcome
from .step_events import After, StepEvents
from .threads import Threads

PAUSE = 2e-4
"""Seconds between looks while somebody waits. It must not spin: other threads need the interpreter."""
LONG_WAIT = 1e-3
"""Seconds that a load may wait for a step before it counts as one that did."""


class Landed(NamedTuple):
    """A load that is over: nothing of it is written any more."""

    job: LoadJob
    outcome: LoadOutcome
    bad: list[int]
    """Its blocks that hold something else."""
    seconds: float
    """Since it was started."""
    waited: bool = False
    """It was seen waiting for a step."""


class _UnderWay:
    """A load whose copy runs beside the steps."""

    def __init__(self, job: LoadJob, store: ShardStore, after: After, began: float) -> None:
        self.job = job
        self.store = store
        self.after = after
        self.began = began
        self.waited = False
        self.loading: Loading | None = None

    def start(self, within: float) -> None:
        self.loading = self.store.start_load(self.job, within)

    def done(self) -> bool:
        """Whether its copy has landed."""
        if self.loading is None or self.loading.done():
            return True
        if not self.waited and time.perf_counter() - self.began > LONG_WAIT:
            self.waited = not self.after.over()
        return False

    def found(self) -> int:
        return self.loading.result().found if self.loading is not None else 0

    def has_rest(self) -> bool:
        return self.loading is not None and self.loading.has_rest()


class Loads:
    """Each load that is launched lands once, whatever becomes of it, and not before its last copy has. Thread-safe."""

    def __init__(self, threads: int, patience: float, complain: Callable[[str, BaseException], None]) -> None:
        """`threads`: for what blocks. `patience`: seconds that the loads of one step may wait for the manager, all together.
        `complain`: told what went wrong, in any thread."""
        self._threads = Threads("vcache-load", threads, complain)
        self._patience = patience
        self._complain = complain
        self._changed = threading.Condition()
        self._under_way: list[_UnderWay] = []
        self._in_threads = 0
        self._landed: list[Landed] = []

    def launch(self, jobs: Sequence[LoadJob], store: ShardStore | None, events: StepEvents) -> None:
        """Start the loads of a step, each behind the step that it names. Without a store they land at once, with nothing.

        Blocks for the questions to the manager, at most `patience` seconds in all: what is left then asks in a thread.
        """
        until = time.monotonic() + self._patience
        for job in jobs:
            began = time.perf_counter()
            if store is None:
                self._land(job, None, None, began)
            else:
                self._start(job, store, events, until - time.monotonic(), began)
        with self._changed:
            self._look()

    def take(self) -> list[Landed]:
        """Take what has landed since the last call. Does not block."""
        if not self.busy:
            return []
        with self._changed:
            self._look()
            landed, self._landed = self._landed, []
        return landed

    @property
    def busy(self) -> bool:
        """Whether a load is under way, or has landed and was not taken."""
        return bool(self._under_way or self._in_threads or self._landed)

    def wait(self, timeout: float) -> None:
        """Wait until a load lands; at most `timeout` seconds, and not without one under way."""
        self._wait_for(lambda: bool(self._landed) or not self.busy, timeout)

    def drain(self, timeout: float) -> bool:
        """Wait until all loads have landed; False on timeout (seconds)."""
        return self._wait_for(lambda: not self._under_way and not self._in_threads, timeout)

    def close(self) -> None:
        """Let the threads end. Does not block."""
        self._threads.close()

    def load(self, job: LoadJob, store: ShardStore | None) -> Landed:
        """Load in this thread. Blocks."""
        began = time.perf_counter()
        found = self._guarded(job, partial(store.load, job)) if store is not None else None
        return self._over(job, store, found, began)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _start(self, job: LoadJob, store: ShardStore, events: StepEvents, left: float, began: float) -> None:
        load: _UnderWay | None = None
        try:
            load = _UnderWay(job, store, events.after(job.after), began)
            if not store.copies_beside or left <= 0:
                self._hand_over(job, store, load.after, began, partial(store.load, job))
                return
            load.after.run(partial(load.start, left))
        except Exception as error:  # noqa: BLE001 - the request waits for its blocks, and can be recomputed
            self._failed(job, error)
        if load is None or load.loading is None:
            self._land(job, store, None, began)
        else:
            with self._changed:
                self._under_way.append(load)

    def _look(self) -> None:
        """See which copies have landed. What storage may have behind them goes on in a thread."""
        for load in list(self._under_way):
            rest = False
            try:
                if not load.done():
                    continue
                rest = load.has_rest()
            except Exception as error:  # noqa: BLE001 - the GPU failed: nothing lands any more
                self._failed(load.job, error)
                load.loading = None
            self._under_way.remove(load)
            if rest:
                self._hand_over(load.job, load.store, load.after, load.began, load.found, load.waited)
            else:
                found = self._guarded(load.job, load.found) if load.loading is not None else None
                self._land(load.job, load.store, found, load.began, load.waited)

    def _hand_over(
        self, job: LoadJob, store: ShardStore, after: After, began: float, work: Callable[[], int], waited: bool = False
    ) -> None:
        """Let a thread find out, with `work`, how many chunks are there."""

        def over(found: int | None) -> None:
            with self._changed:
                self._in_threads -= 1
                self._land(job, store, found, began, waited)

        with self._changed:
            self._in_threads += 1
        self._threads.submit(lambda: over(self._guarded(job, work)), lambda: over(None), after.run)

    def _land(self, job: LoadJob, store: ShardStore | None, found: int | None, began: float, waited: bool = False) -> None:
        landed = self._over(job, store, found, began, waited)
        with self._changed:
            self._landed.append(landed)
            self._changed.notify_all()

    def _over(self, job: LoadJob, store: ShardStore | None, found: int | None, began: float, waited: bool = False) -> Landed:
        """`found`: leading chunks that are there; None when that is not known, or there is no store."""
        bad: list[int] = job.blocks
        broken: tuple[bytes, ...] = ()
        if store is not None and found is not None:
            bad, broken = store.failed_blocks(job, found), store.broken(job)
        return Landed(job, LoadOutcome(1, found or 0, broken), bad, time.perf_counter() - began, waited)

    def _wait_for(self, over: Callable[[], bool], timeout: float) -> bool:
        until = time.monotonic() + timeout
        with self._changed:
            while True:
                self._look()
                left = until - time.monotonic()
                if over() or left <= 0:
                    return over()
                self._changed.wait(min(left, PAUSE) if self._under_way else left)

    def _guarded(self, job: LoadJob, work: Callable[[], int]) -> int | None:
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - as in `_start`
            self._failed(job, error)
        return None

    def _failed(self, job: LoadJob, error: Exception) -> None:
        self._complain(f"load of request {job.request} failed, it is recomputed", error)
