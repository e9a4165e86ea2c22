"""A short soak is clean; without the write gate it is not; and neither leaves anything behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from soak_checker import POISON, compare, poisoned, whose
from support.cluster import eventually
from support.paged import content, spec_for

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "soak.py"
SPEC = spec_for("2BNHD")
TOKENS, OTHER = list(range(16)), list(range(100, 116))

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def soak() -> Iterator[Start]:
    """Starts soaks, each in a session of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait(10)


def members(session: int) -> list[int]:
    """Processes of a session, stopped ones too, without those that only wait to be reaped."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, *fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == session and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.processes
@pytest.mark.slow
def test_a_short_run_is_clean_and_leaves_no_process(soak: Start) -> None:
    run = soak("--minutes", "0.5", "--seed", "1")
    out, _ = run.communicate(timeout=110)
    assert run.returncode == 0, out
    assert "wrong tokens 0, stray rows 0, exceptions 0, hangs 0, unexpected deaths 0: clean" in out
    assert " 0 delivered" not in out
    eventually(lambda: not members(run.pid), what="no process of it is left")


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(("part", "kind"), [("gate", "payloads"), ("fence", "stale-tickets")])
def test_without_the_write_gate_it_finds_wrong_bytes(soak: Start, part: str, kind: str) -> None:
    run = soak("--minutes", "1", "--seed", "2", "--only", kind, "--first", "--without-gate", part)
    out, _ = run.communicate(timeout=110)
    assert run.returncode == 1, out
    assert "WRONG" in out
    assert "of A" in out, "another prompt's bytes"
    assert "exceptions 0, hangs 0, unexpected deaths 0: FAILED" in out
    eventually(lambda: not members(run.pid), what="no process of it is left")


@pytest.mark.processes
@pytest.mark.slow
def test_ctrl_c_ends_it_with_a_summary_and_leaves_no_process(soak: Start) -> None:
    run = soak("--minutes", "5", "--seed", "3", "--verbose")
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("round 1 "):
            break
    os.killpg(run.pid, signal.SIGINT)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 130, out
    assert "interrupted" in out
    assert "tokens asked for" in out
    eventually(lambda: not members(run.pid), what="no process of it is left")


def test_the_checker_sees_one_byte_foreign_rows_unwritten_rows_and_strays() -> None:
    slots = list(range(20, 36))
    paged = poisoned(SPEC, "2BNHD", 6, 8)
    rows = content(SPEC, TOKENS)
    paged.write(slots, rows)
    assert compare(paged, TOKENS, slots, [True] * 16)._replace(rows=b"") == (16, 16, (), 0, b"")
    rows[3, -1, -1] ^= 1
    rows[5] = content(SPEC, OTHER)[5]
    rows[7] = POISON
    paged.write(slots, rows)
    assert compare(paged, TOKENS, slots, [True] * 3 + [False] * 13).wrong == (), "nothing was promised from there on"
    read = compare(paged, TOKENS, slots, [True] * 16)
    assert read.wrong == (3, 5, 7)
    assert whose(SPEC, read, {"B": OTHER}) == "1 of mixed or unknown bytes, 1 of B, 1 of nobody (not written)"
    paged.write([0], rows[:1])
    assert compare(paged, TOKENS, slots, [True] * 16).strays == 1
    assert compare(paged, TOKENS, slots, [False, True] + [False] * 14).strays == 2, "marks that are no prefix"
