"""Make `.venv` for `make test` and the demo without vLLM, or `.venv-lint` for `make lint`. Does nothing twice.

usage: setup.py demo|test|lint

`.venv-lint` is small: no torch is in it. See `venvs.py` for the settings that apply. Standard library only.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from venvs import MODEL, SetupError, Venv, require_python, stop

# The Triton that this torch release goes with: CPU builds of torch do not bring it. Later ones' interpreters differ.
TRITON = "triton==3.7.1"
EXTRAS = {"demo": "demo", "test": "demo,test,cuda,plot,lint", "lint": "lint"}


def set_up(group: str) -> Path:
    """Interpreter of `.venv` or `.venv-lint`, with all that `group` needs. Raises `SetupError`."""
    require_python(group)
    venv = Venv(".venv-lint" if group == "lint" else ".venv", group, Path(__file__))
    if venv.ready():
        return venv.python
    venv.create()
    if group == "lint":
        venv.install("vcache[lint]", "--editable", ".[lint]")
        venv.done()
        return venv.python
    venv.install_torch()
    triton = [TRITON] if "cuda" in EXTRAS[group] else []
    venv.install(f"vcache[{EXTRAS[group]}]", *triton, "--editable", f".[{EXTRAS[group]}]")
    venv.install("the demo's language model", "--no-deps", MODEL)
    if group == "test":
        venv.install("Mooncake, for its tests", "--only-binary=:all:", "--editable", ".[mooncake]", optional=True)
    warn_without_cuda(venv.python)
    venv.done()
    return venv.python


def warn_without_cuda(python: Path) -> None:
    """A GPU that torch cannot use is the commonest silent loss."""
    if shutil.which("nvidia-smi") is None or subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode:
        return
    answer = subprocess.run([python, "-c", "import torch; print(torch.cuda.is_available())"], capture_output=True, check=False)
    if answer.stdout.strip() != b"True":
        print("  note: this machine has a GPU, but this torch cannot use it; everything runs on the CPU. See `vcache doctor`.")


def main() -> None:
    group = sys.argv[1] if len(sys.argv) == 2 else ""
    if group not in EXTRAS:
        stop(f"usage: {sys.argv[0]} {'|'.join(EXTRAS)}")
    try:
        set_up(group)
    except SetupError as error:
        stop(str(error))


if __name__ == "__main__":
    main()
