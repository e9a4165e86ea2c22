"""Every benchmark runs, at a size that takes seconds, and reports what it says it does. Nothing here is timed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cluster import eventually
from support.commands import invoke

from vcache.bench import manager as manager_bench
from vcache.bench import mooncake_master
from vcache.bench.manager import Pipeline
from vcache.bench.population import mount_population, random_keys
from vcache.bench.processes import Cores, choose_cores, manager_process, resident_bytes, running
from vcache.errors import ProtocolError, VCacheError
from vcache.manager.connect import connect
from vcache.storage import mooncake_master as storage_master

pytestmark = pytest.mark.processes


def bench(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "report.json"
    result = invoke("bench", *arguments, "--json", str(path))
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["title"] in result.output
    return found


def verdicts(report: dict[str, Any]) -> list[str]:
    return [note for note in report["notes"] if "target" in note or "verdict" in note]


def test_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_master, "find_master", lambda: None)
    report = bench(tmp_path, "manager", "--chunks", "4096", "--seconds", "0.2")
    assert [(row["request"], row["depth"]) for row in report["rows"]] == [
        ("acquire+release", 1),
        ("acquire+release", 8),
        ("lookup", 8),
    ]
    assert all(row["keys_per_second"] > 0 and row["p99_us"] >= row["p50_us"] > 0 for row in report["rows"])
    assert {"keys_per_cpu_second"} <= report["rows"][0].keys()
    (verdict,) = verdicts(report)
    assert verdict.startswith(("target met, 128 keys a request: ", "target missed, 128 keys a request: "))
    assert any("Mooncake is not installed" in note and "pip install" in note for note in report["notes"])


def test_a_mooncake_that_does_not_start_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mooncake_master, storage_master):
        monkeypatch.setattr(module, "find_master", lambda: "/bin/false")
    monkeypatch.setattr(mooncake_master, "find_spec", lambda name: name)
    found = mooncake_master.measure_mooncake(1, 1, 0.1, choose_cores())
    assert found.rows == []
    assert "mooncake_master did not start" in found.notes[0]


def test_ratios_compare_the_same_depth() -> None:
    rows: list[dict[str, Any]] = [
        {"server": "vcache", "depth": 1, "keys_per_second": 10.0},
        {"server": "vcache", "depth": 8, "keys_per_second": 60.0},
        {"server": "mooncake_master", "depth": 1, "keys_per_second": 20.0},
        {"server": "mooncake_master", "depth": 4, "keys_per_second": 40.0},
        {"server": "mooncake_master", "depth": 8, "keys_per_second": 30.0},
    ]
    manager_bench.add_ratios(rows)
    assert [row.get("ratio") for row in rows] == [0.5, 1.5, None, None, None]


def test_memory(tmp_path: Path) -> None:
    report = bench(tmp_path, "memory", "--chunks", "4000")
    assert [row["chunks"] for row in report["rows"]] == [0, 1000, 2000, 3000, 4000]
    assert report["rows"][0]["resident_mib"] > 5
    assert all(row["bytes_per_chunk"] is not None for row in report["rows"][1:])
    (verdict,) = verdicts(report)
    assert verdict.startswith("no verdict: this run is of 4,000 chunks, the target is for 1,000,000 chunks: ")


def test_lookup(tmp_path: Path) -> None:
    report = bench(tmp_path, "lookup", "--tokens", "4000", "--chunk-size", "256")
    assert {row["chunks"] for row in report["rows"]} == {16}
    assert all(row["p99_ms"] >= row["median_ms"] > 0 for row in report["rows"])
    (verdict,) = verdicts(report)
    ran, target = "4,000 tokens in chunks of 256", "131,072 tokens in chunks of 256"
    assert verdict.startswith(f"no verdict: this run is of {ran}, the target is for {target}: ")


@pytest.mark.slow
def test_engine(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    report = bench(tmp_path, "engine", "--bytes", "32MiB", "--repeats", "1")
    assert [(row["threads"], row["operation"], row["mapping"]) for row in report["rows"]] == [
        (threads, operation, mapping)
        for threads in (1, 2)
        for mapping in ("whole blocks", "random tokens")
        for operation in ("store", "retrieve")
    ]
    assert all(row["gbps"] > 0 and row["copy_gbps"] > 0 for row in report["rows"])
    (verdict,) = verdicts(report)
    assert verdict.startswith(("target met, 32MiB: ", "target missed, 32MiB: "))


# --- what they are made of --------------------------------------------------------------------------------------------


def test_the_population_is_found_and_absent_keys_are_an_error_not_a_number() -> None:
    keys = random_keys(2500)
    assert len(set(keys)) == 2500
    with manager_process() as manager:
        api = connect(manager.config(), role="lender", require=True)
        assert mount_population(api, keys[:1000]) == 1
        assert mount_population(api, keys[1000:], first_segment=1) == 2
        assert api.lookup(keys) == 2500
        assert resident_bytes(manager.pid) > 2**20
        pipeline = Pipeline(manager.address)
        driven = pipeline.acquire([keys[:128], keys[128:256]], 4, 0.05)
        assert driven.keys_per_second > 0
        eventually(lambda: not api.stats().gauges["leases"], what="leases are given back")
        with pytest.raises(ProtocolError, match="not all keys were found"):
            pipeline.lookup([[*keys[:3], bytes(16)]], 1, 0.05)
        pipeline.close()
        api.close()


def test_a_process_that_does_not_start_shows_its_last_words() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no way')"]
    with pytest.raises(VCacheError, match="no way"), running(command, "ready"):
        pass


def test_a_process_ends_with_the_block_even_if_it_ignores_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcache.bench.processes._STOP_TIMEOUT", 0.2)
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    with running([sys.executable, "-c", script], "ready") as process:
        assert process.poll() is None
    assert process.returncode == -9


def test_a_process_is_pinned_and_this_one_is_not() -> None:
    before = os.sched_getaffinity(0)
    cores = choose_cores()
    assert cores == Cores(min(before), max(before))
    script = "import os, sys; print('ready', sorted(os.sched_getaffinity(0)), flush=True); sys.stdin.read()"
    with running([sys.executable, "-c", script], f"ready [{cores.server}]", core=cores.server):
        assert os.sched_getaffinity(0) == before
