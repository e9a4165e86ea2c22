"""Children of the demo: readiness, death, silence, and that none is left behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from vcache.demo import DemoError
from vcache.demo.processes import Child, child_environment, poll

pytestmark = pytest.mark.processes


def python(code: str, folder: Path) -> Child:
    return Child("some child", [sys.executable, "-u", "-c", code], folder)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_lines_arrive_in_order(tmp_path: Path) -> None:
    with python("print('one'); print('two')", tmp_path) as child:
        assert (child.line(10), child.line(10)) == (b"one\n", b"two\n")
    assert not alive(child.pid)


def test_a_dead_child_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with python("import sys; print('oh no', file=sys.stderr); sys.exit(3)", tmp_path) as child:
        with pytest.raises(DemoError, match=r"some child \(pid \d+\) ended with code 3; oh no \(log: .*some-child.log"):
            child.line(10)


def test_a_silent_child_is_reported_in_time(tmp_path: Path) -> None:
    with python("input()", tmp_path) as child:
        began = time.monotonic()
        with pytest.raises(DemoError, match="said nothing for 0 s; it logged nothing"):
            child.line(0.2)
        assert time.monotonic() - began < 5


def test_kill_and_stop_can_be_repeated(tmp_path: Path) -> None:
    with python("input()", tmp_path) as child:
        child.kill()
        child.kill()
        assert not alive(child.pid)
        child.stop()


def test_a_child_that_ignores_everything_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(1000)"
    with python(code, tmp_path) as child:
        child.line(10)
        child.stop(timeout=0.2)
    assert not alive(child.pid)


def test_children_do_not_get_the_terminals_ctrl_c(tmp_path: Path) -> None:
    with python("import os; print(os.getsid(0))", tmp_path) as child:
        assert int(child.line(10)) == child.pid != os.getsid(0)


def test_settings_of_the_user_do_not_reach_the_demo() -> None:
    env = {"VCACHE_CONFIG": "x", "VCACHE_MANAGER_ADDRESS": "tcp://a:1", "VCACHE_LOG_LEVEL": "DEBUG", "PATH": "/bin"}
    kept = child_environment(env)
    assert {"VCACHE_LOG_LEVEL", "PATH", "HF_HUB_OFFLINE"} <= set(kept)
    assert not {"VCACHE_CONFIG", "VCACHE_MANAGER_ADDRESS"} & set(kept)


def test_only_a_model_of_the_user_may_be_fetched() -> None:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    assert child_environment({"HF_HUB_OFFLINE": "0"}).items() >= offline.items()
    assert not offline.keys() & child_environment({}, offline=False).keys()
    # Whoever works offline still does.
    assert child_environment({"HF_HUB_OFFLINE": "1"}, offline=False)["HF_HUB_OFFLINE"] == "1"


def test_what_pydantic_says_in_the_next_line_is_reported(tmp_path: Path) -> None:
    words = "pydantic_core.ValidationError: 1 validation error for ModelConfig\\n  Value error, max_model_len is too large"
    with python(f"import sys; sys.exit('{words}\\n    For further information visit a page')", tmp_path) as child:
        with pytest.raises(DemoError, match=r"for ModelConfig Value error, max_model_len is too large \(log"):
            child.line(10)


def test_poll_gives_up_with_a_reason() -> None:
    with pytest.raises(DemoError, match="the hit did not come back: not within 0 s"):
        poll(lambda: False, 0.05, "the hit did not come back", interval=0.01)
    answers = iter([False, False, True])
    assert poll(lambda: next(answers), 5, "never", interval=0.001) >= 0
