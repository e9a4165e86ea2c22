"""Everything that is to be shown on a machine with a GPU, in one go: smoke checks, engines end to end, return of lent memory,
transfers beside copy engines, interference, the demo, GPU tests. Each part runs in a process of its own with a time limit; a
part that fails is recorded and the others go on.

usage: python3 scripts/gpu_suite.py RESULTS [--only PART,...] [--budget SECONDS] [--quick] [--cpu]

parts: smoke, end_to_end, return, sweep, interference, demo, tests

Writes to the folder RESULTS: gpu_suite.json (all parts, machine, versions; after every part), tests.jsonl (what tests
measured), and the output of each part. Takes seven to nine minutes on an H200. `scripts/bench_pages.py one-gpu
RESULTS/gpu_suite.json PAGE.md` makes a page, a table of all rows and a figure of it. `--cpu` is a dry run over host memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from gpu_parts import SOURCE, Part, Parts, Suite, python_path, run_limited, say

sys.path.insert(0, str(SOURCE))

MIB = 2**20
SMOKE = "tests/gpu/test_gpu_smoke.py"


def tests_of(*chosen: str) -> Callable[[argparse.Namespace, dict[str, Any], Parts], None]:
    """A part that runs GPU tests."""

    def work(arguments: argparse.Namespace, found: dict[str, Any], parts: Parts) -> None:
        command = [sys.executable, "-m", "pytest", *chosen, "-m", "gpu", "-v", "--no-header", "-p", "no:cacheprovider"]
        command += ["--durations=12", "-rA" if arguments.cpu else "-rfE"]
        on_cpu = {"VCACHE_GPU_TESTS_ON_CPU": "1"} if arguments.cpu else {}
        env = python_path(VCACHE_GPU_RESULTS=str(arguments.results / "tests.jsonl"), **on_cpu)
        run(command, env, found, parts)

    return work


def demo(arguments: argparse.Namespace, found: dict[str, Any], parts: Parts) -> None:
    command = [sys.executable, "-m", "vcache.cli", "demo", "--device", "cpu" if arguments.cpu else "cuda", "--engine", "torch"]
    run(command, python_path(), found, parts)


def run(command: list[str], env: dict[str, str], found: dict[str, Any], parts: Parts) -> None:
    """A command that ends well, within what is left of the part's time. Its last lines are kept."""
    log = parts.file.with_suffix(".log")
    found |= run_limited(command, log, max(1.0, parts.left - 2), env)
    assert not found["code"], f"{'its time was over' if found['timed_out'] else found['code']}: {' | '.join(found['last'])}"


def transfers(**chosen: bool) -> Callable[[argparse.Namespace, dict[str, Any], Parts], None]:
    """A part that is a piece of `vcache bench transfer`."""

    def work(arguments: argparse.Namespace, found: dict[str, Any], parts: Parts) -> None:
        from vcache.bench.transfer import TransferOptions, run

        sizes = (1, 16, 256, 1024) if arguments.quick or arguments.cpu else (1, 4, 16, 64, 256, 1024, 2048)
        pages = (4, 32, 256) if arguments.quick else (4, 8, 16, 32, 64, 128, 256)
        options = TransferOptions(
            sizes=tuple(size * MIB for size in sizes),
            page_sizes=tuple(page * 1024 for page in pages),
            sweep=chosen.get("sweep", False),
            full=chosen.get("sweep", False) and not arguments.quick,
            seconds=0.25,
            copy_engines=True,
            interference=chosen.get("interference", False),
            end_to_end=chosen.get("end_to_end", False),
            command="scripts/gpu_suite.py",
        )
        report = run(options, say)
        found |= {"rows": report.rows, "notes": report.notes, "machine": report.machine}
        for note in report.notes:
            say(note)
        failed = [note for note in report.notes if note.startswith("NOT MEASURED")]
        assert not failed, "; ".join(failed)

    return work


def give_back(arguments: argparse.Namespace, found: dict[str, Any], parts: Parts) -> None:
    """Return of 4 GiB of VRAM to its owner while two processes read it."""
    from vcache.bench.give_back import GiveBack, measure
    from vcache.bench.transfer import _SMALL_SPEC

    what = GiveBack(nbytes=4096 * MIB)
    if arguments.cpu:
        what = GiveBack(nbytes=32 * MIB, kind="host", device="cpu", spec=_SMALL_SPEC, tokens=1024, readers=1, rounds=2)
    found |= {"nbytes": what.nbytes, "readers": what.readers, "rounds": measure(what, say)}


SUITE = Suite(
    "gpu_suite",
    __doc__,
    {
        "smoke": Part(tests_of(SMOKE), 60, least=30),
        "end_to_end": Part(transfers(end_to_end=True), 90, least=45),
        "return": Part(give_back, 70, least=35),
        "sweep": Part(transfers(sweep=True), 170, least=85),
        "interference": Part(transfers(interference=True), 90, least=45),
        "demo": Part(demo, 120, least=60),
        "tests": Part(tests_of("tests/gpu", "--deselect", SMOKE), 200, least=100),
    },
    lambda arguments: arguments,
    {"quick": "fewer sizes and page sizes", "cpu": "dry run over host memory"},
    budget=560.0,
)


if __name__ == "__main__":
    sys.exit(SUITE.main())
