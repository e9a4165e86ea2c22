"""Mooncake's bindings that do not load: one line that says what to install, whoever asks."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from support.mooncake import WITHOUT_LIBIBVERBS

from vcache import bindings
from vcache.bindings import MISSING, Problem, find_problem, load
from vcache.config import SegmentConfig
from vcache.errors import ConfigError
from vcache.lender.export import open_export
from vcache.storage.mooncake_options import load_store

LOADER = "libibverbs.so.1: cannot open shared object file: No such file or directory"


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception, *absent: str) -> None:
    """`absent`: libraries that cannot be loaded; all others can."""

    def fail(name: str) -> None:
        raise error

    def library(name: str) -> None:
        if name in absent:
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(bindings, "import_module", fail)
    monkeypatch.setattr(ctypes, "CDLL", library)


@pytest.mark.parametrize(
    ("error", "absent", "problem"),
    [
        (ImportError(LOADER), (), Problem("libibverbs.so.1 is missing", "apt install libibverbs1")),
        (
            ImportError(LOADER),
            ("libibverbs.so.1", "libcurl.so.4"),
            Problem("libibverbs.so.1, libcurl.so.4 are missing", "apt install libibverbs1 libcurl4"),
        ),
        (ModuleNotFoundError("No module named 'mooncake'", name="mooncake"), (), Problem("it is not installed", MISSING)),
        (
            ImportError("libcudart.so.13:\nno such file"),
            (),
            Problem("libcudart.so.13: no such file", f"install the wheel that fits this machine: {MISSING}"),
        ),
    ],
    ids=["a library", "two libraries", "no wheel", "another wheel"],
)
def test_the_reason_is_named(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, absent: tuple[str, ...], problem: Problem
) -> None:
    fail_with(monkeypatch, error, *absent)
    assert find_problem("store") == problem


def export() -> None:
    open_export(SegmentConfig(remote="tcp", remote_host="127.0.0.1"), None)


@pytest.mark.parametrize(("setting", "use"), [("segment.remote", export), ("storage.kind", load_store)])
def test_whoever_needs_it_raises_one_line(monkeypatch: pytest.MonkeyPatch, setting: str, use: Callable[[], object]) -> None:
    fail_with(monkeypatch, ImportError(LOADER))
    with pytest.raises(ConfigError) as caught:
        use()
    assert str(caught.value) == f"{setting}: Mooncake cannot be used: libibverbs.so.1 is missing; apt install libibverbs1"


def test_what_loads_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("mooncake.store")
    monkeypatch.setattr(bindings, "import_module", lambda name: module)
    assert find_problem("store") is None
    assert load("store", "storage.kind") is module


@pytest.mark.processes
@pytest.mark.parametrize(
    ("setting", "arguments"),
    [
        ("segment.remote", ["lend", "--size", "1MiB", "--remote", "tcp", "--remote-host", "127.0.0.1"]),
        ("storage.kind", ["lend-storage", "--size", "64MiB"]),
    ],
)
def test_a_machine_without_libibverbs_gets_one_line(setting: str, arguments: list[str], tmp_path: Path) -> None:
    """With the library hidden, also where it is installed."""
    env = {**os.environ, "PYTHONPATH": str(WITHOUT_LIBIBVERBS), "VCACHE_MANAGER_ADDRESS": f"unix://{tmp_path}/m.sock"}
    command = [sys.executable, "-m", "vcache.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode
    assert "Traceback" not in done.stderr
    assert f"{setting}: Mooncake cannot be used: libibverbs.so.1" in done.stderr
    assert "apt install libibverbs1" in done.stderr
