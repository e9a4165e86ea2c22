"""An object in a process of its own: calls and their types, deadlines, deaths on either side, and a clean end."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from support.cluster import eventually

from vcache.config import ByteSize
from vcache.worker import Line, Worker, WorkerError, WorkerFailed


class Point(msgspec.Struct, frozen=True):
    x: int
    raw: bytes = b""


class Found(NamedTuple):
    point: Point
    names: dict[int, str]


class Desk:
    """What the tests have served."""

    def __init__(self, line: Line, folder: Path, offset: int = 0) -> None:
        if offset < 0:
            raise ValueError("no such\noffset")
        self._line, self._folder, self._offset = line, folder, offset
        print("what libraries print is no answer")

    def close(self) -> None:
        (self._folder / f"closed-{self._offset}").touch()

    def add(self, point: Point, *, more: tuple[int, ...] = ()) -> Found:
        return Found(Point(point.x + self._offset + sum(more), point.raw[::-1]), {1: "one"})

    def types(self, **named: Any) -> dict[str, str]:
        return {name: type(value).__name__ for name, value in named.items()}

    def fail(self) -> None:
        raise LookupError("nothing\n  there")

    def unsayable(self) -> Any:
        return object()

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def die(self, words: str) -> None:
        print(words, file=sys.stderr)
        print("and the last line", flush=True)
        os._exit(3)

    def pid(self) -> int:
        return os.getpid()

    def start_another(self) -> int:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

    def read_input(self) -> str:
        return sys.stdin.read()

    def count(self, until: int) -> int:
        """Tells every number; each is followed by a note of the parent's."""
        total = 0
        for number in range(until):
            self._line.tell({"number": number})
            total += self._line.heard(10.0)
        with pytest.raises(queue.Empty):
            self._line.heard(0.0)
        return total

    def _private(self) -> None:
        """Not served."""


def desk(folder: Path, offset: int = 0, **options: Any) -> Worker:
    return Worker(Desk, {"folder": folder, "offset": offset}, **options)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with desk(tmp_path, offset=5, name="desk", timeout=20.0) as started:
        yield started.ready()


def test_arguments_and_results_have_the_types_of_the_method(worker: Worker) -> None:
    assert worker.call(Desk.add, Point(1, b"ab"), more=(1, 2)) == Found(Point(9, b"ba"), {1: "one"})
    sized = ByteSize(2**20)
    assert worker.call(Desk.types, a=1, b=[2], c=sized, d=Path("/")) == {"a": "int", "b": "list", "c": "int", "d": "str"}
    assert worker.call(Desk.read_input) == ""


def test_calls_are_answered_in_the_order_in_which_they_were_begun_and_waited_for_in_any(worker: Worker) -> None:
    first, second = worker.begin(Desk.add, Point(1)), worker.begin(Desk.pid)
    assert second.result() == worker.pid != os.getpid()
    assert first.result().point.x == 6


def test_what_a_method_raises_is_told_in_one_line_and_the_worker_goes_on(worker: Worker) -> None:
    with pytest.raises(WorkerFailed, match="desk: LookupError: nothing there") as failed:
        worker.call(Desk.fail)
    assert (failed.value.kind, failed.value.text) == ("LookupError", "nothing there")
    assert "in fail" in worker.tail()
    with pytest.raises(WorkerFailed, match="TypeError"):
        worker.call(Desk.unsayable)
    with pytest.raises(WorkerFailed, match=r"ValidationError.*Expected `object`"):
        worker.call(Desk.add, 3)  # type: ignore[arg-type]
    with pytest.raises(WorkerFailed, match="serves no '_private'"):
        worker.call(Desk._private)
    assert worker.call(Desk.pid) == worker.pid


def test_a_late_answer_is_not_taken_for_the_next_one(worker: Worker) -> None:
    late = worker.begin(Desk.sleep, 0.5)
    with pytest.raises(WorkerError, match=r"desk \(pid \d+\): no answer to sleep within 0.05 s"):
        late.result(0.05)
    assert worker.call(Desk.pid) == worker.pid
    assert late.result() == 0.5


def test_both_sides_can_say_something_during_a_call(worker: Worker) -> None:
    notes: list[Any] = []

    def on_note(note: Any) -> None:
        notes.append(note)
        worker.tell(note["number"] * 10)

    assert worker.begin(Desk.count, 3).result(on_note=on_note) == 30
    assert notes == [{"number": 0}, {"number": 1}, {"number": 2}]


def test_the_death_of_a_worker_is_told_with_its_last_words(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"desk \(pid \d+\) ended with code 3 during die; SomeError: no memory$"):
        worker.call(Desk.die, "SomeError: no memory")
    with pytest.raises(WorkerError, match="ended with code 3"):
        worker.call(Desk.pid)
    with desk(tmp_path, log=tmp_path / "desk.log") as other:
        other.ready().signal(signal.SIGKILL)
        with pytest.raises(WorkerError, match=rf"code -9 during pid; .*no answer \(log: {tmp_path}/desk.log\)"):
            other.call(Desk.pid)


def test_the_log_can_be_read_after_the_end(tmp_path: Path) -> None:
    with desk(tmp_path) as worker:
        worker.ready()
    assert worker.tail() == "what libraries print is no answer"


def test_an_object_that_cannot_be_made_leaves_no_process(tmp_path: Path) -> None:
    worker = desk(tmp_path, offset=-1)
    with pytest.raises(WorkerFailed, match="Desk: ValueError: no such offset"):
        worker.ready()
    assert not worker.alive
    with pytest.raises(WorkerError, match="Desk"):
        worker.call(Desk.pid)
    worker.close()


def test_a_clean_end_finishes_what_was_begun_and_closes_the_object(worker: Worker, tmp_path: Path) -> None:
    worker.begin(Desk.sleep, 0.2)
    worker.close()
    assert not worker.alive
    assert (tmp_path / "closed-5").exists()
    worker.close()


def test_a_call_without_end_is_ended_after_the_grace_with_all_that_it_started(tmp_path: Path) -> None:
    with desk(tmp_path, grace=0.2) as worker:
        other = worker.ready().call(Desk.start_another)
        worker.begin(Desk.sleep, 600.0)
        began = time.monotonic()
    assert time.monotonic() - began < 5.0
    assert not worker.alive
    eventually(lambda: gone(other), what="the process that it started is gone")


@pytest.mark.parametrize("end", ["close", "death"])
def test_what_a_worker_started_goes_with_it(tmp_path: Path, end: str) -> None:
    """It stayed where the worker itself had gone first: by its end, or by its death."""
    with desk(tmp_path) as worker:
        other = worker.ready().call(Desk.start_another)
        if end == "death":
            worker.signal(signal.SIGKILL)
            eventually(lambda: not worker.alive, what="it is dead")
    eventually(lambda: gone(other), what="the process that it started is gone")


def test_a_stopped_worker_can_be_ended(tmp_path: Path) -> None:
    with desk(tmp_path, grace=0.2) as worker:
        worker.ready().signal(signal.SIGSTOP)
        with pytest.raises(WorkerError, match=r"no answer to pid within 0\.1 s"):
            worker.begin(Desk.pid).result(0.1)
        worker.kill()
        assert not worker.alive


@pytest.mark.parametrize("busy", [False, True])
def test_the_death_of_the_parent_ends_the_worker(tmp_path: Path, busy: bool) -> None:
    code = (
        "import sys, time; from vcache.worker import Worker; from test_worker import Desk; "
        f"worker = Worker(Desk, {{'folder': {str(tmp_path)!r}}}, grace=0.2).ready(); "
        f"{'worker.begin(Desk.sleep, 600.0);' if busy else ''} print(worker.pid, flush=True); time.sleep(600)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not gone(child)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    eventually(lambda: gone(child), what="the worker is gone")
    assert (tmp_path / "closed-0").exists() is not busy


def test_threads_may_begin_calls_while_one_waits(worker: Worker) -> None:
    pending: list[Any] = []
    threads = [threading.Thread(target=lambda n=n: pending.append((n, worker.begin(Desk.add, Point(n))))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(each.result().point.x == number + 5 for number, each in pending)


def gone(pid: int) -> bool:
    """Whether a process has ended, whoever has still to be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
