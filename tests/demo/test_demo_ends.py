"""Nothing is left behind: on SIGTERM, when the demo itself is killed, in shared memory, in the folder of the logs."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from vcache.children import sessions
from vcache.children.sessions import kill_session, members
from vcache.demo import DemoError, engines, main, model
from vcache.demo.processes import Process, guarded

pytestmark = pytest.mark.processes

DEMO = """
import sys
from pathlib import Path
from vcache.demo.processes import Process, guarded
from vcache.children.stops import stop_signals
try:
    with stop_signals(), Process("child", guarded("http.server", "0"), Path(sys.argv[1])) as child:
        print(child.pid, flush=True)
        sys.stdin.read()
except KeyboardInterrupt:
    print("interrupted")
"""
DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("deaf", flush=True)
time.sleep(600)
"""
SHARED_MEMORY = """
import multiprocessing, time
from multiprocessing import shared_memory
memory = shared_memory.SharedMemory(create=True, size=4096)
print(memory.name, flush=True)
time.sleep(600)
"""


def until(true: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def demo(folder: Path, code: str = DEMO, **env: str) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | env)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_demo_that_is_told_to_stop_ends_its_children(tmp_path: Path, number: int) -> None:
    process, child = demo(tmp_path)
    assert members(child)
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == "interrupted\n"
    assert process.returncode == 0
    assert members(child) == []


def test_children_end_when_the_demo_is_killed(tmp_path: Path) -> None:
    process, child = demo(tmp_path)
    until(lambda: b"guard" in Path(f"/proc/{child}/cmdline").read_bytes() and "Serving" in (tmp_path / "child.log").read_text())
    process.kill()
    process.communicate(timeout=30)
    until(lambda: members(child) == [])


def test_a_child_that_does_not_hear_sigterm_ends_with_the_demo_too(tmp_path: Path) -> None:
    """It, and what it started."""
    (tmp_path / "deaf.py").write_text(DEAF)
    code = DEMO.replace('guarded("http.server", "0")', 'guarded("deaf")')
    process, child = demo(tmp_path, code, PYTHONPATH=str(tmp_path))
    until(lambda: len(members(child)) == 2 and "deaf" in (tmp_path / "child.log").read_text())
    process.kill()
    process.communicate(timeout=30)
    until(lambda: members(child) == [])


def test_a_child_that_starts_too_late_ends_at_once() -> None:
    gone = subprocess.run(
        [sys.executable, "-m", "vcache.children.guard", "1", "this"], capture_output=True, text=True, timeout=60, check=False
    )
    if os.getpid() != 1:
        assert gone.returncode == 1
        assert gone.stderr == "process 1 is gone\n"


def test_shared_memory_of_killed_processes_is_given_back() -> None:
    process = subprocess.Popen([sys.executable, "-c", SHARED_MEMORY], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    memory = Path("/dev/shm") / process.stdout.readline().strip()
    assert memory.exists()
    # The tracker may be started but not yet itself: until then it looks like any other process.
    until(lambda: any(sessions._is_tracker(pid) for pid in members(process.pid)))
    kill_session(process.pid)
    process.wait(30)
    process.stdout.close()
    assert not memory.exists()


def test_a_child_that_fails_or_takes_too_long_is_reported(tmp_path: Path) -> None:
    with Process("converter", guarded("no_such_module"), tmp_path) as child:
        with pytest.raises(
            DemoError, match=r"converter \(pid \d+\) ended with code 1; ImportError: No module named no_such_module"
        ):
            child.finish(60)
    with Process("slow", guarded("http.server", "0"), tmp_path) as child:
        with pytest.raises(DemoError, match=r"slow .* takes longer than 0 s"):
            child.finish(0.1)
    with Process("good", guarded("this"), tmp_path) as child:
        child.finish(60)


@pytest.mark.parametrize("outcome", ["good", "problem", "error", "stopped"])
def test_logs_stay_only_when_something_failed(monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    folders: list[Path] = []

    def play(stage: object, folder: Path, engine: str, device: str, tokens: int, given: object) -> list[str]:
        folders.append(folder)
        (folder / "vllm-a.log").write_text("a line")
        if outcome == "error":
            raise DemoError("it broke")
        if outcome == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        return ["the answer differs: '[/INST]'"] if outcome == "problem" else []

    monkeypatch.setattr(main, "_play", play)
    monkeypatch.setattr(engines, "installed_vllm", lambda: "vllm 1.2")
    monkeypatch.setattr(model, "missing_packages", list)
    output = io.StringIO()
    console = Console(file=output, width=500)
    if outcome == "error":
        with pytest.raises(DemoError):
            main.run(console=console)
    elif outcome == "stopped":
        with pytest.raises(KeyboardInterrupt):
            main.run(console=console)
    else:
        assert main.run(console=console) == (1 if outcome == "problem" else 0)
    kept = outcome in ("problem", "error")
    assert folders[0].exists() == kept
    assert (str(folders[0]) in output.getvalue()) == kept
    assert ("FAILED the answer differs: '[/INST]'" in output.getvalue()) == (outcome == "problem")
    if kept:
        (folders[0] / "vllm-a.log").unlink()
        folders[0].rmdir()
