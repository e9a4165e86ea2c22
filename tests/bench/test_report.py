"""Benchmark reports: percentiles, tables, files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from rich.console import Console

from vcache.bench.report import Column, Report, machine, percentile, print_report, save_report, verdict
from vcache.errors import VCacheError


def report() -> Report:
    return Report(
        title="Speed [of light]",
        command="vcache bench light",
        columns=[
            Column("what", "what"),
            Column("rate", "GB/s", ",.1f"),
            Column("count", "n", "d"),
            Column("hidden", "no", "d", False),
        ],
        rows=[{"what": "[bold]a", "rate": 1234.56, "count": 3}, {"what": "b", "rate": None, "hidden": 1}],
        notes=["target [met]"],
    )


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.01, 0.5, 0.99, 1.0)] == [1, 1, 50, 99, 100]
    assert percentile([7.0], 0.99) == 7.0


def test_the_table_shows_rows_notes_and_machine_literally(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w+") as out:
        print_report(report(), Console(file=out, width=120))
        out.seek(0)
        shown = out.read()
    for word in ("Speed [of light]", "[bold]a", "1,234.6", "target [met]", "vcache bench light", "python 3."):
        assert word in shown
    assert "hidden" not in shown
    assert "no" not in shown.split("\n")[2].split()
    assert "│ b" in shown
    assert " - " in shown


def test_files_hold_the_rows(tmp_path: Path) -> None:
    save_report(report(), tmp_path / "r.json", tmp_path / "r.csv")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["rows"] == report().rows
    assert found["machine"]["python"]
    assert found["command"] == "vcache bench light"
    with open(tmp_path / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"what": "[bold]a", "rate": "1234.56", "count": "3", "hidden": ""}
    assert rows[1] == {"what": "b", "rate": "", "count": "", "hidden": "1"}


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(VCacheError, match=r"cannot write .*: No such file or directory"):
        save_report(report(), tmp_path / "nowhere" / "r.json")


def test_dash_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    save_report(report(), Path("-"))
    assert json.loads(capsys.readouterr().out)["title"] == "Speed [of light]"


def test_the_machine_names_cpu_load_and_versions() -> None:
    found = machine()
    assert {"cpu", "memory", "load", "kernel", "python", "vcache", "msgspec"} <= found.keys()


def test_a_run_of_another_size_than_the_targets_is_not_judged() -> None:
    assert verdict("fast", True, of="128 keys") == verdict("fast", True, of="128 keys", ran="128 keys")
    assert verdict("fast", True, of="128 keys") == "target met, 128 keys: fast"
    assert verdict("fast", False, of="128 keys") == "target missed, 128 keys: fast"
    other = "no verdict: this run is of 4 keys, the target is for 128 keys: fast"
    assert verdict("fast", True, of="128 keys", ran="4 keys") == verdict("fast", False, of="128 keys", ran="4 keys") == other
