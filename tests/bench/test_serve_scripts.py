"""The script of the loaded server and the page that is made of its results; no GPU, no vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
FAKE = Path(__file__).parent / "fake_server"
sys.path.insert(0, str(SCRIPTS))

import gpu_serve  # noqa: E402
import loaded_page  # noqa: E402

GIB = 2**30


def case(*arguments: str, gpu: int = 141 * GIB) -> gpu_serve.Case:
    return gpu_serve.chosen_case(gpu_serve.parser().parse_args(arguments), gpu)


def run(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "gpu_serve.py"), "--out", str(folder), *arguments]
    environment = os.environ | {"PYTHONPATH": str(FAKE)} | env
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_the_load_of_the_issue() -> None:
    loaded = case()
    assert (loaded.instances, loaded.kv_memory, loaded.host_memory) == (2, 64 * GIB, 48 * GIB)
    shape = loaded.shape
    assert (shape.conversations, shape.turns, shape.systems, shape.concurrency) == (48, 5, 12, 12)
    assert (shape.system_tokens, shape.turn_tokens, shape.answer_tokens) == (6000, 1500, 64)
    assert case("--pool-memory", "8GiB", "--way", "vcache", "--way", "none").ways == ("none", "vcache")
    assert case("--pool-memory", "8GiB").pool_memory == 8 * GIB
    assert case("--pool-memory", "0").pool_memory == 0
    single = case("--case", "single")
    assert (single.instances, single.kv_memory, single.host_memory) == (1, 16 * GIB, 48 * GIB)


def test_what_fits_fits() -> None:
    """Its working set, in the 8B shape, is smaller than what each instance has to itself, under each way."""
    fits = case("--case", "fits")
    shape = fits.shape
    tokens = shape.systems * shape.system_tokens + shape.conversations * shape.turns * (shape.turn_tokens + shape.answer_tokens)
    assert 1.25 * tokens * 128 * 1024 < (fits.kv_memory - fits.pool_memory) / fits.instances


def test_a_smaller_gpu_gets_less_of_everything() -> None:
    small, whole = case(gpu=79 * GIB), case()
    assert 2 * 16e9 + small.kv_memory < 72 * GIB, "weights, KV, and something for activations"
    for found, expected in (
        (small.kv_memory / whole.kv_memory, 0.5625),
        (small.pool_memory / whole.pool_memory, 0.5625),
        (small.shape.conversations / whole.shape.conversations, 0.5625),
    ):
        assert found == pytest.approx(expected, rel=0.02)
    assert small.shape.concurrency == whole.shape.concurrency
    assert case("--case", "single", gpu=79 * GIB) == case("--case", "single"), "one instance has room for it"


@pytest.mark.processes
def test_results_are_two_files(tmp_path: Path) -> None:
    answer = run(tmp_path, "--tiny", "--way", "none", "--way", "vcache", "--loads", "2", "--name", "trial")
    assert answer.returncode == 0, answer.stderr + answer.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == ["trial-logs.txt", "trial.json"]
    report = json.loads((tmp_path / "trial.json").read_text())
    assert [(row["way"], row["runs_done"], len(row["runs"])) for row in report["rows"]] == [("none", 1, 2), ("vcache", 1, 2)]
    logs = (tmp_path / "trial-logs.txt").read_text()
    assert "=== vcache-1-manager.log" in logs
    assert "--skip-tokenizer-init" in logs, "the servers' own words"
    assert "vcache   1 loads: later turns mean " in answer.stdout
    assert "of 8 requests" not in answer.stdout


@pytest.mark.processes
def test_what_was_measured_when_the_time_is_over_is_kept(tmp_path: Path) -> None:
    """The second way hangs at its start."""
    answer = run(tmp_path, "--tiny", "--way", "none", "--way", "vcache", "--budget", "25", FAKE_FAULT="VCacheConnector:hang")
    assert answer.returncode == 3, answer.stderr + answer.stdout
    report = json.loads((tmp_path / "tiny.json").read_text())
    assert [(row["way"], row["runs_done"]) for row in report["rows"]] == [("none", 3)]
    assert any(note.startswith("interrupted") for note in report["notes"])


def test_without_a_gpu_one_line_says_what_is_missing(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    if torch.cuda.is_available():
        pytest.skip("says what happens without a GPU")
    answer = run(tmp_path)
    assert (answer.returncode, len(answer.stderr.strip().splitlines())) == (2, 1)
    assert "no GPU" in answer.stderr


def report() -> dict[str, Any]:
    row = dict.fromkeys([*loaded_page._MS, "hit_ratio", "loaded_gb", "own_hit_tokens"], 100.0)
    row |= {"requests_per_second": 2.0, "queried_tokens": 400.0, "computed_tokens": 100.0, "connector_hit_tokens": 200.0}
    runs = [{"discarded": True, "later_mean_ms": 1.0}]
    runs += [{"discarded": False, "later_mean_ms": value} for value in (90.0, 110.0)]
    ours = row | {"way": "vcache", "runs_done": 2, "later_p90_ms": 75.0, "loaded_dram_gb": 7.5, "runs": runs}
    theirs = row | {"way": "lmcache", "runs_done": 2, "requests_per_second": 1.6, "loaded_gb": None}
    machine = {"cpu": "a CPU", "kernel": "6"}
    return {
        "title": "loaded: a load",
        "rows": [theirs, ours],
        "notes": ["x"],
        "machine": machine,
        "command": "c",
        "when": "now",
    }


def test_the_page_has_the_numbers_between_its_marks() -> None:
    text = f"before\n{loaded_page.BEGIN}\nold\n{loaded_page.END}\nafter\n"
    made = loaded_page.page(text, [report()])
    assert made.startswith("before\n")
    assert made.endswith(f"{loaded_page.END}\nafter\n")
    assert "old" not in made
    assert "| vcache | 2 | 100 [90-110] | 100 | 75 | " in made, "the discarded load is not in the spread"
    assert "- vcache against lmcache: later turns, mean x 1.00, p90 x 0.75, p99 x 1.00, req/s x 1.25" in made
    assert "| 25% | 50% | 25% |" in made
    for table in made.split("\n\n"):
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1, table
    assert loaded_page.page(made, [report()]) == made
    with pytest.raises(ValueError, match="no <!-- numbers: begin -->"):
        loaded_page.page("nothing", [])


def test_the_page_of_the_documentation_has_the_marks() -> None:
    text = (ROOT / "docs" / "benchmarks" / "loaded.md").read_text()
    assert text.index(loaded_page.BEGIN) < text.index(loaded_page.END)
