"""Everything that is to be shown on a machine with a GPU, in one go: smoke checks, GPU tests, transfers, engines end to end,
interference. Each part runs in a process of its own with a time limit; a part that fails is recorded and the others go on.

usage: python3 scripts/gpu_suite.py OUT [--only smoke,tests,sweep,end_to_end,interference] [--quick] [--cpu]

Writes to the folder OUT: suite.json (all parts, machine, versions), tests.jsonl (what tests measured), transfer.json,
transfer.csv, transfer.png, summary.md, and the output of each part. Takes four to six minutes on an H100. `--cpu` is a dry
run over host memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
LIMITS = {"smoke": 75, "tests": 190, "sweep": 170, "end_to_end": 90, "interference": 60}
"""Seconds that each part may take."""
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(LIMITS), help="parts, comma-separated")
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
        "machine": machine(),
        "parts": {},
    }
    for part in arguments.only.split(","):
        begin = time.perf_counter()
        say(f"== {part} (limit {LIMITS[part]} s)")
        found = run_part(part, arguments)
        found["seconds"] = round(time.perf_counter() - begin, 1)
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


def run_part(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    out: Path = arguments.out
    if part == "smoke":
        command = [sys.executable, str(ROOT / "scripts" / "gpu_smoke.py"), str(out / "smoke.json")]
    elif part == "tests":
        command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-m", "gpu", "-v", "--no-header"]
        command += ["-p", "no:cacheprovider", "--durations=12", "-rA" if arguments.cpu else "-rfE"]
        command += ["--deselect", "tests/gpu/test_gpu_smoke.py"]
    else:
        command = [sys.executable, __file__, str(out), "--part", part]
        command += ["--quick"] if arguments.quick else []
        command += ["--cpu"] if arguments.cpu else []
    return execute(command, out / f"{part}.txt", LIMITS[part], environment(arguments))


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    found["VCACHE_GPU_RESULTS"] = str((arguments.out / "tests.jsonl").resolve())
    if arguments.cpu:
        found["VCACHE_GPU_TESTS_ON_CPU"] = "1"
    return found


def execute(command: list[str], log: Path, limit: float, env: dict[str, str]) -> dict[str, Any]:
    """Run with a time limit, output to the log and on; on timeout the whole process group ends."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    import selectors

    deadline = time.monotonic() + limit
    lines: list[str] = []
    selector = selectors.DefaultSelector()
    os.set_blocking(process.stdout.fileno(), False)
    selector.register(process.stdout, selectors.EVENT_READ)
    rest = ""
    timed_out = False
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            timed_out = True
            os.killpg(process.pid, 9)
            break
        if not selector.select(min(left, 1.0)):
            if process.poll() is not None:
                break
            continue
        data = os.read(process.stdout.fileno(), 65536).decode(errors="replace")
        if not data:
            break
        *whole, rest = (rest + data).split("\n")
        for line in whole:
            lines.append(line)
            say("   " + line[:300])
    process.wait()
    log.write_text("\n".join(lines) + rest + "\n")
    code = -9 if timed_out else process.returncode
    return {"code": code, "timed_out": timed_out, "command": command, "last": [line for line in lines if line.strip()][-5:]}


# Parts that run in a child of this script ----------------------------------------------------------------------------------


def bench(part: str, out: Path, quick: bool, cpu: bool) -> None:
    from vcache.bench.report import save_report
    from vcache.bench.transfer import TransferOptions, run

    sizes = (1, 16, 256, 1024) if quick or cpu else (1, 4, 16, 64, 256, 1024, 2048)
    pages = (4, 32, 256) if quick else (4, 8, 16, 32, 64, 128, 256)
    options = TransferOptions(
        sizes=tuple(size * MIB for size in sizes),
        page_sizes=tuple(page * 1024 for page in pages),
        sweep=part == "sweep",
        full=part == "sweep" and not quick,
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


def machine() -> dict[str, str]:
    query = "name,uuid,driver_version,memory.total,memory.free,pcie.link.gen.current,pcie.link.width.current"
    found = {"kernel": os.uname().release, "cpus": str(os.cpu_count()), "python": sys.version.split()[0]}
    try:
        found["nvidia-smi"] = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        found["nvidia-smi"] = str(error)
    return found


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


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
