"""No settings from outside, a folder for sockets, and processes that are gone after the test."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import Starter


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not `tmp_path`: the path of a unix socket must stay short."""
    made = Path(tempfile.mkdtemp(prefix="vc-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No `VCACHE_*` of whoever runs the tests; sockets go into a folder of the test's own."""
    for name in [name for name in os.environ if name.startswith("VCACHE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VCACHE_SEGMENT_BROKER_DIR", str(folder))


@pytest.fixture
def start(folder: Path) -> Iterator[Starter]:
    """Start a process; all of them are gone after the test."""
    starter = Starter(folder)
    yield starter
    starter.kill_all()
