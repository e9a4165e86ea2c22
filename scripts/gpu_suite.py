"""Everything that is to be shown on a machine with a GPU, in one go: smoke checks, engines end to end, return of lent memory,
transfers beside copy engines, interference, the demo, GPU tests. Each part runs in a process of its own with a time limit; a
part that fails is recorded and the others go on.

usage: python3 scripts/gpu_suite.py OUT [--only PART,...] [--budget SECONDS] [--quick] [--cpu]

parts: smoke, end_to_end, return, sweep, interference, demo, tests

Writes to the folder OUT: suite.json (all parts, machine, versions; after every part), tests.jsonl (what tests measured),
return.json, transfer.json, transfer.csv, transfer.png, summary.md, and the output of each part. Takes seven to nine minutes on
an H200. `scripts/bench_pages.py one-gpu OUT/suite.json` makes a page of it. `--cpu` is a dry run over host memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_parts import ROOT, SOURCE, machine_facts, python_path, run_limited, say

LIMITS = {"smoke": 60, "end_to_end": 90, "return": 70, "sweep": 170, "interference": 90, "demo": 120, "tests": 200}
"""The parts in their order, and the seconds that each may take."""
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(LIMITS), help="parts, comma-separated")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds; parts that do not fit any more are left out")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and page sizes")
    parser.add_argument("--cpu", action="store_true", help="dry run over host memory")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        sys.path.insert(0, str(SOURCE))
        bench(arguments.part, arguments.out, arguments.quick, arguments.cpu)
        return 0
    return suite(arguments)


def suite(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    start = time.perf_counter()
    result: dict[str, Any] = {
        "command": " ".join(["python3", *sys.argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine_facts(),
        "parts": {},
    }
    for part in chosen(arguments.only):
        left = arguments.budget - (time.perf_counter() - start)
        if left < LIMITS[part] / 2:
            result["parts"][part] = {"code": 1, "timed_out": False, "seconds": 0.0, "last": [f"left out: {left:.0f} s left"]}
            say(f"== {part}: left out, {left:.0f} s left")
            continue
        say(f"== {part} (limit {LIMITS[part]} s)")
        found = run_part(part, arguments)
        result["parts"][part] = found
        say(f"== {part}: {'ok' if found['code'] == 0 else 'FAILED'} in {found['seconds']} s")
        save(out / "suite.json", result)
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["notes"] = merge(out)
    save(out / "suite.json", result)
    (out / "summary.md").write_text(summary(result))
    say(summary(result))
    say(f"total {result['seconds']} s")
    return int(any(part["code"] for part in result["parts"].values()))


def chosen(only: str) -> list[str]:
    """Raises `SystemExit` for an unknown part."""
    names = [name for name in only.split(",") if name]
    if unknown := [name for name in names if name not in LIMITS]:
        raise SystemExit(f"gpu_suite: no part {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    return names


def run_part(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    out: Path = arguments.out
    if part == "smoke":
        command = [sys.executable, str(ROOT / "scripts" / "gpu_smoke.py"), str(out / "smoke.json")]
    elif part == "tests":
        command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-m", "gpu", "-v", "--no-header"]
        command += ["-p", "no:cacheprovider", "--durations=12", "-rA" if arguments.cpu else "-rfE"]
        command += ["--deselect", "tests/gpu/test_gpu_smoke.py"]
    elif part == "demo":
        command = [sys.executable, "-m", "vcache.cli", "demo", "--device", "cpu" if arguments.cpu else "cuda"]
        command += ["--engine", "torch"] if demo_has_engines() else []
    else:
        command = [sys.executable, __file__, str(out), "--part", part]
        command += ["--quick"] if arguments.quick else []
        command += ["--cpu"] if arguments.cpu else []
    return run_limited(command, out / f"{part}.txt", LIMITS[part], environment(arguments))


def demo_has_engines() -> bool:
    """Whether `vcache demo` can be told which engine to play with."""
    command = [sys.executable, "-m", "vcache.cli", "demo", "--help"]
    answer = subprocess.run(command, env=python_path(COLUMNS="200"), capture_output=True, text=True, timeout=60, check=False)
    return "--engine" in answer.stdout


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    found = python_path(VCACHE_GPU_RESULTS=str((arguments.out / "tests.jsonl").resolve()))
    if arguments.cpu:
        found["VCACHE_GPU_TESTS_ON_CPU"] = "1"
    return found


# Parts that run in a child of this script ----------------------------------------------------------------------------------


def bench(part: str, out: Path, quick: bool, cpu: bool) -> None:
    if part == "return":
        give_back(out, cpu)
        return
    from vcache.bench.report import save_report
    from vcache.bench.transfer import TransferOptions, run

    sizes = (1, 16, 256, 1024) if quick or cpu else (1, 4, 16, 64, 256, 1024, 2048)
    pages = (4, 32, 256) if quick else (4, 8, 16, 32, 64, 128, 256)
    options = TransferOptions(
        sizes=tuple(size * MIB for size in sizes),
        page_sizes=tuple(page * 1024 for page in pages),
        sweep=part == "sweep",
        full=part == "sweep" and not quick,
        seconds=0.25,
        copy_engines=True,
        interference=part == "interference",
        end_to_end=part == "end_to_end",
        command=f"scripts/gpu_suite.py ({part})",
    )
    begin = time.perf_counter()
    report = run(options, lambda line: say(f"{time.perf_counter() - begin:6.1f} s  {line}"))
    save_report(report, out / f"bench_{part}.json")
    for note in report.notes:
        say(note)
    if any(note.startswith(("NOT MEASURED", "FAILED")) for note in report.notes):
        sys.exit(1)


def give_back(out: Path, cpu: bool) -> None:
    """Return of 4 GiB of VRAM to its owner while two processes read it."""
    from vcache.bench.give_back import GiveBack, measure
    from vcache.bench.transfer import _SMALL_SPEC

    what = GiveBack(nbytes=4096 * MIB)
    if cpu:
        what = GiveBack(nbytes=32 * MIB, kind="host", device="cpu", spec=_SMALL_SPEC, tokens=1024, readers=1, rounds=2)
    rounds = measure(what, say)
    save(out / "return.json", {"nbytes": what.nbytes, "readers": what.readers, "rounds": rounds})
    for each in rounds:
        say(json.dumps(each))


def merge(out: Path) -> list[str]:
    """One transfer.json, .csv and .png of the bench parts; their notes."""
    sys.path.insert(0, str(SOURCE))
    notes: list[str] = []
    reports = [json.loads(path.read_text()) for path in sorted(out.glob("bench_*.json"))]
    if not reports:
        return notes
    merged = reports[-1] | {"rows": [row for report in reports for row in report["rows"]]}
    merged["notes"] = notes = [note for report in reports for note in report["notes"]]
    save(out / "transfer.json", merged)
    for path in out.glob("bench_*.json"):
        path.unlink()

    def table() -> None:
        import csv

        from vcache.bench.transfer_rows import COLUMNS

        names = [column.key for column in COLUMNS] + ["nbytes", "grid", "tflops", "tflops_alone", "gbps_alone", "loss"]
        with (out / "transfer.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(merged["rows"])

    def figure() -> None:
        from vcache.bench.plot import draw
        from vcache.bench.transfer_rows import curves

        gpu = merged["machine"].get("gpu", merged["machine"].get("cpu", ""))
        draw(curves(merged["rows"]), out / "transfer.png", title=f"Moving KV: directly in VRAM, and through DRAM\n{gpu}")

    for step in (table, figure):
        attempt(step, notes)
    return notes


def attempt(step: Callable[[], None], notes: list[str]) -> None:
    try:
        step()
    except Exception as error:  # noqa: BLE001 - a missing figure must not cost the numbers
        notes.append(f"FAILED: {step.__name__}: {type(error).__name__}: {error}")


def summary(result: dict[str, Any]) -> str:
    lines = [f"# GPU suite, {result['date']}", "", f"`{result['command']}`", ""]
    lines += [f"- {name}: {value}" for name, value in result["machine"].items()]
    lines += ["", "| part | result | seconds | last line |", "|---|---|---|---|"]
    for name, part in result["parts"].items():
        verdict = "ok" if part["code"] == 0 else "TIMED OUT" if part["timed_out"] else f"FAILED ({part['code']})"
        lines.append(f"| {name} | {verdict} | {part['seconds']} | {(part['last'] or [''])[-1][:120]} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in result.get("notes", []))]) + "\n"


def save(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, default=str))


if __name__ == "__main__":
    sys.exit(main())
