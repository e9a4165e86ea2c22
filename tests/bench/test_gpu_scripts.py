"""The GPU scripts without a GPU: options, isolation of parts, time limits, results on disk, pages made of them."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.cluster import eventually

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_page_parts  # noqa: E402
import bench_pages  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_suite  # noqa: E402
import gpu_vllm  # noqa: E402
import gpu_vllm_engine  # noqa: E402
import gpu_vllm_world  # noqa: E402
import two_gpus  # noqa: E402
import two_gpus_vllm  # noqa: E402

from vcache.worker import WorkerError  # noqa: E402

FAKE_VLLM = Path(__file__).with_name("fake_vllm")
MIB, GIB = 2**20, 2**30
FACTS = {"cpu": "a CPU", "torch": "2.11", "nvidia-smi": "NVIDIA H200, GPU-1, 580.1, 143771 MiB, 1 MiB, 5, 16"}


def parts(folder: Path, budget: float = 60.0, only: tuple[str, ...] = ()) -> gpu_parts.Parts:
    return gpu_parts.Parts(folder / "results.json", budget, only, machine=FACTS)


def on_disk(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


# parts


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    run = parts(tmp_path)

    def broken(found: dict[str, Any]) -> None:
        found["half"] = 1
        raise RuntimeError("it broke")

    assert not run.run("first", broken)
    assert run.run("second", lambda found: found.update(all=2))
    saved = on_disk(tmp_path)["parts"]
    assert (saved["first"]["state"], saved["first"]["found"]) == ("failed", {"half": 1})
    assert "RuntimeError: it broke" in saved["first"]["why"]
    assert (saved["second"]["state"], saved["second"]["found"]) == ("ok", {"all": 2})
    assert run.failures() == [f"first: {saved['first']['why']}"]


def test_parts_that_are_not_wanted_or_too_long_are_left_out(tmp_path: Path) -> None:
    run = parts(tmp_path, budget=5.0, only=("long", "short"))
    ran: list[str] = []
    assert not run.run("other", lambda found: ran.append("other"))
    assert not run.run("long", lambda found: ran.append("long"), need=60)
    assert run.run("short", lambda found: ran.append("short"), need=1)
    assert ran == ["short"]
    saved = on_disk(tmp_path)["parts"]
    assert list(saved) == ["long", "short"]
    assert saved["long"]["state"] == "skipped"
    assert "60 needed" in saved["long"]["why"]
    assert run.failures() == []


def test_results_are_on_disk_while_a_part_runs(tmp_path: Path) -> None:
    run = parts(tmp_path)
    seen: list[Any] = []

    def work(found: dict[str, Any]) -> None:
        found["rows"] = [1, 2]
        run.write()
        seen.append(on_disk(tmp_path)["parts"]["p"])

    run.run("p", work)
    assert seen == [{"state": "running", "seconds": 0.0, "found": {"rows": [1, 2]}}]
    assert set(on_disk(tmp_path)) == {"script", "command", "date", "budget", "machine", "parts"}


def test_a_process_is_ended_at_its_limit_with_its_children(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    code = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True); p.wait()"
    )
    began = time.monotonic()
    found = gpu_parts.run_limited([sys.executable, "-c", code], tmp_path / "log.txt", 1.5, os.environ)
    assert time.monotonic() - began < 10
    assert (found["code"], found["timed_out"]) == (-9, True)
    grandchild = int((tmp_path / "log.txt").read_text())
    deadline = time.monotonic() + 5
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(grandchild)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_ctrl_c_ends_a_part_and_what_it_started_elsewhere(tmp_path: Path) -> None:
    """Both went on, and kept a GPU's memory: each is in a session of its own."""
    inner = "import os, sys; from gpu_parts import run_limited; from pathlib import Path; "
    inner += "run_limited([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'], "
    inner += f"Path({str(tmp_path / 'inner.txt')!r}), 600, os.environ)"
    outer = "import os, signal, sys; from gpu_parts import run_limited; from pathlib import Path; "
    outer += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    outer += f"run_limited([sys.executable, '-c', {inner!r}], Path({str(tmp_path / 'outer.txt')!r}), 600, os.environ)"
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "-c", outer], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    sleeper = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    process.wait(30)
    process.stdout.close()
    eventually(lambda: not Path(f"/proc/{sleeper}").exists(), what="the inner part is gone")


def test_a_process_that_ends_says_how(tmp_path: Path) -> None:
    code = "print('one'); print('two'); raise SystemExit(3)"
    found = gpu_parts.run_limited([sys.executable, "-c", code], tmp_path / "log.txt", 20, os.environ)
    assert (found["code"], found["timed_out"], found["last"]) == (3, False, ["one", "two"])
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n"


# options


@pytest.mark.parametrize("script", ["two_gpus.py", "gpu_vllm.py"])
def test_without_gpus_one_line_says_what_is_missing(script: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    if torch.cuda.is_available():
        pytest.skip("says what happens without a GPU")
    arguments = [str(tmp_path)] if script == "two_gpus.py" else ["--out", str(tmp_path)]
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode != 0
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
    assert "two GPUs" in answer.stderr or "vLLM" in answer.stderr or "no GPU" in answer.stderr
    assert answer.stdout == ""


def test_unknown_parts_are_refused() -> None:
    for choose in (two_gpus.SUITE.chosen, gpu_suite.SUITE.chosen, gpu_vllm.chosen):
        with pytest.raises(SystemExit, match=r"no part nonsense; there are "):
            choose("nonsense")
    assert two_gpus.SUITE.chosen("") == list(two_gpus.SUITE.parts)
    assert two_gpus.SUITE.chosen("faults,engines") == ["faults", "engines"]
    assert gpu_vllm.chosen("") == []
    assert {"pool", "start AB", "ttft AB", "ttft ABCD"} <= set(gpu_vllm.chosen("ttft"))


def test_budgets_fit_the_time_that_is_given() -> None:
    assert gpu_vllm.parser().parse_args([]).budget <= 470
    for suite, budget in ((two_gpus.SUITE, 480), (gpu_suite.SUITE, 560)):
        assert suite.parser().parse_args(["x"]).budget <= budget
        assert all(15 <= part.least <= part.limit for part in suite.parts.values())
        assert sum(part.least for part in suite.parts.values()) <= budget, "some part could never run"


def test_a_part_whose_process_died_has_failed(tmp_path: Path) -> None:
    ended = {"code": -9, "timed_out": True, "seconds": 9.0, "last": ["the last line"], "command": []}
    lost = gpu_parts.merged(tmp_path / "part_sweep.json", "sweep", ended)
    assert (lost["state"], lost["found"], lost["seconds"]) == ("failed", {}, 9.0)
    assert "the last line" in lost["why"]
    part = {"state": "running", "seconds": 0.0, "found": {"rows": [1]}}
    (tmp_path / "part_sweep.json").write_text(json.dumps({"parts": {"sweep": part}}))
    cut = gpu_parts.merged(tmp_path / "part_sweep.json", "sweep", ended)
    assert (cut["state"], cut["found"]) == ("failed", {"rows": [1]})
    assert "its time was over" in cut["why"]
    part["state"] = "ok"
    (tmp_path / "part_sweep.json").write_text(json.dumps({"parts": {"sweep": part}}))
    good = gpu_parts.merged(tmp_path / "part_sweep.json", "sweep", ended | {"code": 0})
    assert (good["state"], good["seconds"]) == ("ok", 9.0)


def test_steps_of_the_vllm_part_are_isolated(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    run = two_gpus_vllm.Run.__new__(two_gpus_vllm.Run)
    run.found, run.parts = found, parts(tmp_path, budget=10.0)

    def broken() -> None:
        raise ValueError("no engine")

    done: list[int] = []
    run.step("first", broken)
    run.step("second", lambda: done.append(2))
    run.step("third", lambda: done.append(3), need=100)
    assert done == [2]
    assert found["failed"]["first"] == "ValueError: no engine"
    assert found["failed"]["third"].startswith("left out")
    assert set(found["seconds"]) == {"first", "second"}


def test_small_things() -> None:
    assert two_gpus_vllm.at([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert two_gpus_vllm.at([1.0, 2.0, 3.0, 4.0], 0.99) == 4.0
    state = {"id": 4, "began": 1.0, "times": [1.5, 1.75, 2.75], "asked": 9}
    assert gpu_vllm_engine._driven(state, 8) == {
        "id": 4,
        "ttft": 0.5,
        "gaps": [0.25, 1.0],
        "cached": 8,
        "asked": 9,
        "tokens": 3,
    }
    assert gpu_vllm_engine._same("driven-1-af01", "driven-1")
    assert not gpu_vllm_engine._same("driven-10", "driven-1")


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.py")))
def test_what_a_script_imports_from_here_is_there(script: str) -> None:
    """Also inside functions that only a machine with GPUs comes to."""
    pytest.importorskip("torch", reason="needs torch")
    for node in ast.walk(ast.parse((SCRIPTS / script).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vcache":
            module = import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}"), f"{node.module}: {alias.name}"


# whole suites, over host memory


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flag", "names"),
    [("two_gpus.py", "--dry-run", ("faults", "interference")), ("gpu_suite.py", "--cpu", ("return", "interference"))],
)
def test_a_suite_without_a_gpu(script: str, flag: str, names: tuple[str, str], tmp_path: Path) -> None:
    """A part that starts every kind of process, and one that a GPU is needed for: both say what they found."""
    torch = pytest.importorskip("torch", reason="needs torch")
    if torch.cuda.is_available():
        pytest.skip("says what happens without a GPU")
    command = [sys.executable, str(SCRIPTS / script), str(tmp_path), "--only", ",".join(names), flag]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    saved = json.loads((tmp_path / script.replace(".py", ".json")).read_text())
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert {name: part["state"] for name, part in saved["parts"].items()} == dict.fromkeys(names, "ok")
    assert saved["options"] == [flag]
    assert all(part["found"] for part in saved["parts"].values())
    assert f"{names[0]} " in answer.stdout


# vLLM's engines, with a vLLM that computes nothing


@pytest.mark.processes
@pytest.mark.slow
def test_engines_are_started_asked_and_ended(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    if torch.cuda.is_available():
        pytest.skip("a trial on the CPU")
    command = [sys.executable, str(SCRIPTS / "gpu_vllm.py"), "--out", str(tmp_path), "--tiny", "--only", "overhead,decoding"]
    env = os.environ | {"PYTHONPATH": str(FAKE_VLLM)}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=env)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    saved = json.loads((tmp_path / "gpu_vllm.json").read_text())
    parts = {name: part["state"] for name, part in saved["parts"].items()}
    assert parts == dict.fromkeys(("pool", "start ABCD", "warm-up ABCD", "overhead", "decoding"), "ok")
    assert saved["parts"]["start ABCD"]["found"]["A"]["name"] == "cpu"
    assert len(saved["parts"]["overhead"]["found"]["A"]) == 2
    assert "is no answer" in (tmp_path / "logs" / "A.log").read_text()
    assert "lending" in (tmp_path / "logs" / "lender.log").read_text()


@pytest.mark.processes
def test_requests_are_served_while_they_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch")
    monkeypatch.syspath_prepend(str(FAKE_VLLM))
    world = gpu_vllm_world.World(tmp_path, tiny=True, lengths=[64])
    try:
        assert world.start_engines({"A": (None, 0), "B": (None, 0)}) == {}
        clients = two_gpus_vllm.run_clients(world, ["A", "B"], [[[1, 2, 3]] * 3] * 4, 5)
        assert (clients["requests"], clients["hit_ratio"], len(clients["ttfts_ms"])) == (12, 0.0, 12)
        mixed = two_gpus_vllm.mixed_load(world, ["A"], ["B"], [[1, 2]] * 2, [[3, 4, 5]] * 2, (6, 2))
        assert (mixed["streams"], mixed["long_cached_tokens"]) == (2, [0, 0])
        world.engines["B"].signal(signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"B .* ended with code -9"):
            two_gpus_vllm.run_clients(world, ["B"], [[[1]]], 5)
    finally:
        world.close()
    assert not world.engines


def test_an_engine_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch")
    monkeypatch.syspath_prepend(str(FAKE_VLLM))
    monkeypatch.setattr(gpu_vllm_world.World, "options", lambda self: {"model": "nowhere"})
    world = gpu_vllm_world.World(tmp_path, tiny=True, lengths=[64])
    world.logs = tmp_path / "logs"
    failed = world.start_engines({"A": (None, 0)})
    assert "FileNotFoundError" in failed["A"]
    assert not world.has("A")
    assert "nowhere/config.json" in (tmp_path / "logs" / "A.log").read_text()


# pages


def results(name: str, found: dict[str, Any], **more: Any) -> dict[str, Any]:
    part = {"state": "ok", "seconds": 1.0, "found": found}
    lost = {"state": "failed", "seconds": 2.0, "found": {}, "why": "RuntimeError: a | b\nmore"}
    return {
        "date": "2026-11-24T08:00:00Z",
        "command": "python3 x.py",
        "machine": FACTS,
        "parts": {name: part, "lost": lost},
    } | more


def page(kind: str, value: dict[str, Any], folder: Path) -> str:
    (folder / "in.json").write_text(json.dumps(value))
    command = [sys.executable, str(SCRIPTS / "bench_pages.py"), kind, str(folder / "in.json"), str(folder / "page.md")]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    return (folder / "page.md").read_text()


def test_page_of_vllm(tmp_path: Path) -> None:
    modes = {
        "B, through VCache": {"32784": [40.0, 44.0, 48.0]},
        "B, own prefix hit": {"32784": [35.0, 36.0, 37.0]},
        "recompute, no connector": {"32784": [1200.0, 1210.0]},
        "native CPU offload": {"32784": [80.0]},
    }
    value = results("overhead", {"length": 2048, "A": [104.0, 105.0], "C": [100.0, 101.0]}, ttft_ms=modes, lengths=[32784])
    value["first_tokens"] = {"VCache": {"prompts": 3, "all equal": 3, "last two equal": 3}}
    text = page("vllm", value, tmp_path)
    assert "1 x NVIDIA H200, 143771 MiB, driver 580.1" in text
    assert "| B, through VCache | 44.0 [40.0-48.0] |" in text
    assert "- met: at 32k tokens 1.22 times the own prefix hit" in text
    assert "- **missed**: 1.82 times as fast as native CPU offload at 32k tokens" in text
    assert "- **missed**: time to first token of new prompts of 2,048 tokens" in text
    assert "+4.0%" in text
    assert "| lost | failed | 2.0 | RuntimeError: a / b |" in text
    assert "all ways equal in 3" in text


def row(path: str, operation: str, nbytes: int, gbps: float, page: int = 0, ratio: float | None = None) -> dict[str, Any]:
    found = {"path": path, "operation": operation, "nbytes": nbytes, "gbps": gbps, "gbps_low": gbps, "gbps_high": gbps}
    if page:
        found |= {"page_bytes": page, "mapping": "blocks", "ratio": ratio}
    return found


def test_page_of_two_gpus(tmp_path: Path) -> None:
    rows = [
        row("peer", "retrieve", GIB, 372.0, 32768, 0.946),
        row("peer", "retrieve", GIB, 350.0, 4096, 0.89),
        row("peer", "store", GIB, 366.0, 32768, 0.93),
        row("peer copy engines", "retrieve", GIB, 380.0, 32768, 0.97),
        row("peer copy", "copy", GIB, 393.0),
        row("bounce serial from a peer", "copy", GIB, 28.0),
    ]
    value = results("sweep", {"rows": rows, "notes": ["met: something"]})
    ok = value["parts"]["sweep"]
    value["parts"]["mooncake"] = ok | {"found": {"rows": [row("Mooncake over TCP", "copy", GIB, 1.7)]}}
    value["parts"]["grids"] = ok | {"found": {"retrieve": {"8": 79.0, "64": 367.0}, "programs for 95%, retrieve": 64}}
    lost = {"where": "lending GPU", "work": "decoding", "unit": "GB/s", "moves": "retrieve from the peer", "grid": 64}
    lost |= {"rate": 3000.0, "rate_alone": 4000.0, "loss": 0.25, "gbps": 300.0, "gbps_alone": 367.0}
    value["parts"]["interference"] = ok | {"found": {"rows": [lost]}}
    back = {"grown_ms": 20.0, "shrink_ms": 9.0, "free_ms": 9.5, "reads": [{"rounds": 4, "wrong": 0}]}
    back["free_bytes"] = {"before": 10 * GIB, "lent": 2 * GIB, "loaded": 2 * GIB, "after": 10 * GIB}
    value["parts"]["return"] = ok | {"found": {"nbytes": 8 * GIB, "rounds": [back]}}
    text = page("two-gpus", value, tmp_path)
    assert "| 1 GiB | 372 (0.95) |  | 366 (0.93) | 393 | 28.0 / - / - |  | 1.7 |" in text
    assert "| retrieve | 350 (0.89) | 372 (0.95) |" in text
    assert "| copy engines, retrieve |  | 380 (0.97) |" in text
    assert "- retrieve: 64 programs reach 95% of the fastest" in text
    assert "### Decoding, lending GPU" in text
    assert "| retrieve from the peer | 64 | 4,000 | 3,000 | 25.0% | 367 | 300 | 0.83 |" in text
    assert "8 GiB back to the owner, 1 process(es) reading: free after 9.5 [9.5-9.5] ms." in text
    assert "10,240 / 2,048 / 10,240" in text
    assert (tmp_path / "page" / "transfer.csv").read_text().startswith("path,operation,nbytes")
    assert "(page/transfer.png)" in text or "No figure" in text


def test_page_of_one_gpu(tmp_path: Path) -> None:
    end = row("engine, other process", "retrieve", 4 * GIB, 1000.0, 32768)
    end |= {"size": "4 GiB", "call_ms": 4.3, "call_p99_ms": 9.9, "runs": 300, "gbps_low": 859.0, "gbps_high": 1047.5}
    value = results("x", {})
    demo = {"code": 0, "timed_out": False, "seconds": 60.0, "last": ["All answers are equal"]}
    found = {"end_to_end": {"rows": [end], "notes": ["met: something", "another"]}, "demo": demo}
    value["parts"] = {name: {"state": "ok", "seconds": 60.0, "found": each} for name, each in found.items()}
    text = page("one-gpu", value, tmp_path)
    assert "- met: something\n" in text
    assert (tmp_path / "page" / "transfer.csv").read_text().startswith("path,operation,nbytes")
    assert "| retrieve | 4 GiB | 4.30 [4.10-5.00] | 9.90 | 300 |" in text
    assert "All answers are equal" in text


def test_a_page_of_other_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps(results("x", {})))
    command = [sys.executable, str(SCRIPTS / "bench_pages.py"), "vllm", str(tmp_path / "in.json"), str(tmp_path / "p.md")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 1
    assert "no result of vllm: 'ttft_ms' is missing" in answer.stderr


def test_tables_keep_their_cells() -> None:
    assert bench_page_parts.table(["a", "b"], [["x|y", 1]]) == ["| a | b |", "| --- | --- |", "| x/y | 1 |"]
    assert bench_pages.grid_lines({}) == bench_pages.engine_lines({}) == bench_pages.fault_lines({}) == []
    assert bench_page_parts.at_size(["8208", "32784"], 32768) == "32784"
