"""Saves beside the steps: one thread starts them, and ends each as soon as its bytes have landed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from .jobs import Saved, SaveUnderWay, ShardStore
from .metadata import SaveJob, SaveOutcome
from .step_events import After
from .threads import Work

T = TypeVar("T")

DROPPED = Saved(SaveOutcome(1, False, True))
SHORT_PAUSE, LONG_PAUSE = 2e-4, 2e-3
"""Seconds between looks at what is under way; they grow while nothing lands, which may take a forward pass."""


class _Batch:
    """Saves of one step, in the order in which they start."""

    def __init__(self, jobs: Sequence[SaveJob], store: ShardStore, after: After) -> None:
        self.waiting = deque(jobs)
        self.store = store
        self.after = after
        self.left = len(jobs)
        self.over = threading.Event()


class _Save:
    """A save that was started."""

    def __init__(self, job: SaveJob, batch: _Batch, under_way: SaveUnderWay) -> None:
        self.job = job
        self.batch = batch
        self.under_way = under_way


class Saver:
    """Does in one thread, in order, what it is given. No save waits for the bytes of another. Each is over once, whatever
    becomes of it. Thread-safe."""

    def __init__(self, over: Callable[[SaveJob, Saved], None], complain: Callable[[str, BaseException], None]) -> None:
        """`over`: a save ended, and its blocks may be reused. `complain`: told what went wrong. Both in any thread."""
        self._over = over
        self._complain = complain
        self._changed = threading.Condition()
        self._queue: deque[Work] = deque()
        self._open = 0
        """Pieces of work that are queued or being done, and saves under way."""
        self._under_way: list[_Save] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    def save(self, jobs: Sequence[SaveJob], store: ShardStore, after: After) -> threading.Event:
        """Start saves behind `after`, once what was given before has started. Does not block. The event is set when all of them
        are over."""
        batch = _Batch(jobs, store, after)
        if not self._submit(partial(self._start, batch)):
            self._refuse(batch)
        return batch.over

    def drop(self, store: ShardStore, digests: list[bytes]) -> None:
        """Take broken chunks out of the pool, before the saves that are given later start. Does not block."""
        self._submit(partial(self._guarded, "broken chunks were not dropped", partial(store.drop, digests)))

    def drain(self, timeout: float) -> bool:
        """Wait until all that was given is over; False on timeout (seconds)."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def close(self) -> None:
        """Let the thread end when all is over; refuse more. Idempotent. Does not block."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = SHORT_PAUSE
        while True:
            with self._changed:
                if not self._queue:
                    self._changed.wait_for(lambda: self._queue or self._closed, pause if self._under_way else None)
                if self._closed and not self._queue and not self._under_way:
                    return
                work = self._queue.popleft() if self._queue else None
            if work is not None:
                work()
                self._count(-1)
            pause = SHORT_PAUSE if self._look() or work is not None else min(2 * pause, LONG_PAUSE)

    def _start(self, batch: _Batch) -> None:
        try:
            batch.after.run(partial(self._start_all, batch))
        except Exception as error:  # noqa: BLE001 - work that cannot follow the step must not be done
            self._complain("a transfer ended", error)
        self._refuse(batch)

    def _start_all(self, batch: _Batch) -> None:
        while batch.waiting:
            job = batch.waiting.popleft()
            started = self._guarded(_failure(job), partial(batch.store.start_save, job))
            if started is None:
                self._end(job, batch, DROPPED)
                continue
            save = _Save(job, batch, started)
            if self._landed(save):
                self._finish(save)
            else:
                self._count(1)
                self._under_way.append(save)

    def _look(self) -> bool:
        """End the saves that have landed. Whether there was one."""
        landed = [save for save in self._under_way if self._landed(save)]
        for save in landed:
            self._under_way.remove(save)
            self._finish(save)
            self._count(-1)
        return bool(landed)

    def _landed(self, save: _Save) -> bool:
        """Whether it has. What cannot be asked has ended: `_finish` waits if it must."""
        return self._guarded(_failure(save.job), save.under_way.landed) is not False

    def _finish(self, save: _Save) -> None:
        self._end(save.job, save.batch, self._guarded(_failure(save.job), save.under_way.finish) or DROPPED)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _submit(self, work: Work) -> bool:
        """Whether a thread will do it."""
        with self._changed:
            if self._closed:
                return False
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="vcache-save", daemon=True)
                try:
                    thread.start()
                except Exception as error:  # noqa: BLE001 - no thread can be started
                    self._complain("a transfer was not started", error)
                    return False
                self._thread = thread
            self._open += 1
            self._queue.append(work)
            self._changed.notify_all()
        return True

    def _refuse(self, batch: _Batch) -> None:
        """Drop what was not started."""
        while batch.waiting:
            self._end(batch.waiting.popleft(), batch, DROPPED)

    def _end(self, job: SaveJob, batch: _Batch, saved: Saved) -> None:
        self._over(job, saved)
        batch.left -= 1
        if not batch.left:
            batch.over.set()

    def _count(self, change: int) -> None:
        with self._changed:
            self._open += change
            self._changed.notify_all()

    def _guarded(self, what: str, work: Callable[[], T]) -> T | None:
        """The result of work; None, and a line in the log, when it breaks."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - the scheduler waits for all saves to free their blocks
            self._complain(what, error)
        return None


def _failure(job: SaveJob) -> str:
    return f"save of request {job.request} failed"
