"""Work beside the model runner's is done or refused, once. Needs no vLLM."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from vcache.integrations.vllm.threads import Threads, Work

if TYPE_CHECKING:
    from collections.abc import Iterator

Told = list[str]


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def threads(told: Told) -> Iterator[Threads]:
    made = Threads("test", 1, lambda what, error: told.append(f"{what}: {error}"))
    yield made
    made.close()


def do(work: Work) -> None:
    work()


def fail(work: Work) -> None:
    raise RuntimeError("no stream")


def test_work_is_done_and_not_refused(threads: Threads, told: Told) -> None:
    future = threads.submit(lambda: told.append("done"), lambda: told.append("refused"), do)
    assert future is not None
    future.result(10)
    threads.close()
    assert told == ["done"]


def test_work_that_cannot_begin_is_refused(threads: Threads, told: Told) -> None:
    threads.submit(lambda: told.append("done"), lambda: told.append("refused"), fail)
    threads.close()
    assert told == ["a transfer ended: no stream", "refused"]


def test_work_that_has_begun_is_not_refused(threads: Threads, told: Told) -> None:
    def work() -> None:
        raise RuntimeError("half-way")

    threads.submit(work, lambda: told.append("refused"), do)
    threads.close()
    assert told == ["a transfer ended: half-way"]


def test_without_threads_work_is_refused_in_this_one(threads: Threads, told: Told) -> None:
    threads.close()
    assert threads.submit(lambda: told.append("done"), lambda: told.append("refused"), do) is None
    assert told == ["a transfer was not started: cannot schedule new futures after shutdown", "refused"]


def test_drain_waits_for_all_that_was_submitted(threads: Threads, told: Told) -> None:
    go = threading.Event()
    threads.submit(lambda: told.append(str(go.wait(10))), lambda: None, do)
    threads.submit(lambda: told.append("second"), lambda: None, do)
    threading.Timer(0.05, go.set).start()
    threads.drain()
    assert told == ["True", "second"]
