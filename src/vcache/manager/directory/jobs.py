"""Work on very many slots or keys, done in slices between which everybody else is served."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import Generic, TypeVar

from ...errors import VCacheError

T = TypeVar("T")

SLICE = 256
"""Slots or keys that are worked on between two pauses: below a millisecond."""


class Job(Generic[T]):
    """Does one such work: a generator that pauses after each slice and returns the result. Not thread-safe."""

    __slots__ = ("_error", "_result", "_steps", "done")

    def __init__(self, steps: Generator[None, None, T]) -> None:
        self._steps = steps
        self._result: list[T] = []
        self._error: Exception | None = None
        self.done = False

    def step(self) -> None:
        """Do one slice, unless it is done. What the work raises is raised by `result`."""
        if self.done:
            return
        try:
            next(self._steps)
        except StopIteration as end:
            self._result.append(end.value)
            self.done = True
        except Exception as error:  # noqa: BLE001 - the caller of `result` gets it
            self._error = error
            self.done = True

    def cancel(self, reason: VCacheError) -> None:
        """Stop between two slices; `result` raises `reason`. Does nothing when it is done."""
        if not self.done:
            self._steps.close()
            self._error = reason
            self.done = True

    def finish(self) -> T:
        """Do all that is left, and return the result."""
        while not self.done:
            self.step()
        return self.result()

    def result(self) -> T:
        """Return what it came to, once it is done."""
        assert self.done
        if self._error is not None:
            raise self._error
        return self._result[0]


class Jobs:
    """Does all jobs under way, each in its turn."""

    def __init__(self) -> None:
        self._waiting: deque[Job[object]] = deque()

    def __bool__(self) -> bool:
        """Whether any job is not done."""
        self._forget_done()
        return bool(self._waiting)

    def begin(self, steps: Generator[None, None, T]) -> Job[T]:
        """Begin a job, whose first slice is done at once."""
        job = Job(steps)
        job.step()
        self._forget_done()  # Whoever finishes each job at once never asks for those that wait.
        if not job.done:
            self._waiting.append(job)  # type: ignore[arg-type]
        return job

    def step(self) -> None:
        """Do one slice of the job whose turn it is, if there is one."""
        if self:
            job = self._waiting.popleft()
            job.step()
            if not job.done:
                self._waiting.append(job)

    def _forget_done(self) -> None:
        while self._waiting and self._waiting[0].done:
            self._waiting.popleft()
