"""What a benchmark found: rows, the machine it ran on, and how they are printed and saved."""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from .. import __version__
from ..errors import VCacheError

if TYPE_CHECKING:
    from rich.console import Console

_MOONCAKE = ("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine-cuda13")
PACKAGES = ("msgspec", "uvloop", "numpy", "torch", "triton", "cuda-bindings", "vllm", *_MOONCAKE)
"""Packages whose versions matter to a measurement; those that are installed are reported, without importing them."""
_QUIET_LOAD = 0.7


class Column(NamedTuple):
    key: str
    heading: str
    form: str = ""
    """`format` specification of numbers, such as `,.0f`."""
    printed: bool = True
    """False: only in the CSV file."""


class Report(msgspec.Struct, kw_only=True):
    """The result of one benchmark. Rows are dicts by column key; a value that was not measured is None and prints as `-`."""

    title: str
    command: str
    columns: Sequence[Column]
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    """What a reader must know to judge the numbers: targets met, missed or not judged, what was left out and why."""
    machine: dict[str, str] = msgspec.field(default_factory=lambda: machine())
    when: str = msgspec.field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def __post_init__(self) -> None:
        load = os.getloadavg()[0]
        if load > _QUIET_LOAD:
            self.notes = [
                *self.notes,
                f"not a quiet machine: load {load:.1f} at the start; other processes took part of the time",
            ]

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in msgspec.to_builtins(self).items() if name != "columns"}


def machine() -> dict[str, str]:
    """CPU, cores, memory, load, kernel, and the versions that matter. Reads `/proc`; imports nothing heavy."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = {
        "cpu": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} usable cores",
        "memory": f"{pages / 2**30:.1f} GiB",
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "vcache": __version__,
    }
    return found | package_versions(PACKAGES)


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Name -> version of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` (any order, not empty) that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def verdict(target: str, met: bool, *, of: str, ran: str = "") -> str:
    """A note on a target. `of`: the size that it is for; a run of another size (`ran`) is not judged."""
    if ran in ("", of):
        return f"target {'met' if met else 'missed'}, {of}: {target}"
    return f"no verdict: this run is of {ran}, the target is for {of}: {target}"


def print_report(report: Report, console: Console) -> None:
    """A table, the notes, the machine."""
    from rich.markup import escape
    from rich.table import Table

    console.print(report.title, style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table()
    columns = [column for column in report.columns if column.printed]
    for column in columns:
        table.add_column(escape(column.heading), justify="right" if column.form else "left")
    for row in report.rows:
        table.add_row(*(escape(_cell(row.get(column.key), column.form)) for column in columns))
    console.print(table)
    for note in report.notes:
        console.print(f"  {note}", markup=False, highlight=False)
    facts = "; ".join(f"{name} {value}" for name, value in report.machine.items())
    console.print(f"{report.command}  |  {report.when}  |  {facts}", style="dim", markup=False, highlight=False)


def save_report(report: Report, json_file: Path | None = None, csv_file: Path | None = None) -> None:
    """Write to the files named; `-` is stdout. Raises `VCacheError` when a file cannot be written."""
    if json_file is not None:
        _write(json_file, msgspec.json.format(msgspec.json.encode(report.to_dict()), indent=2).decode() + "\n")
    if csv_file is not None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.key for column in report.columns])
        writer.writerows([[row.get(column.key) for column in report.columns] for row in report.rows])
        _write(csv_file, text.getvalue())


def _write(path: Path, text: str) -> None:
    if str(path) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        path.write_text(text)
    except OSError as error:
        raise VCacheError(f"cannot write {path}: {error.strerror}") from None


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) if form and isinstance(value, int | float) else str(value)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
