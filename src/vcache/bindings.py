"""Whether Mooncake's bindings load on this machine, and what to install when they do not."""

from __future__ import annotations

import ctypes
import os
from importlib import import_module
from typing import Any, Literal, NamedTuple

from .errors import ConfigError

Part = Literal["engine", "store"]
"""`mooncake.engine`: the transfer engine; `mooncake.store`: the store."""

LIBRARIES = {"libibverbs.so.1": "libibverbs1", "libcurl.so.4": "libcurl4", "libnuma.so.1": "libnuma1"}
"""System libraries that Mooncake's wheels need, also for TCP, and their packages in Debian and Ubuntu."""
MISSING = f"pip install 'vcache[mooncake]' and the system libraries {', '.join(LIBRARIES.values())}"


class Problem(NamedTuple):
    """Why a part of Mooncake cannot be used here. `str` is one line."""

    detail: str
    advice: str

    def __str__(self) -> str:
        return f"{self.detail}; {self.advice}"


def find_problem(part: Part) -> Problem | None:
    """What stands in the way of a part of Mooncake; None when it loads. Imports it, hence neither torch nor NumPy."""
    found = _import(part)
    return found if isinstance(found, Problem) else None


def load(part: Part, setting: str) -> Any:
    """The module. `setting`: what asked for it, for the message. Raises `ConfigError`, one line, when it does not load."""
    found = _import(part)
    if isinstance(found, Problem):
        raise ConfigError(f"{setting}: Mooncake cannot be used: {found}")
    return found


def _import(part: Part) -> Any:
    """The module, or the `Problem`."""
    # Mooncake logs to stderr by itself, and a lot, every full store as a warning; what matters is counted here.
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    try:
        return import_module(f"mooncake.{part}")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "mooncake":
            return Problem("it is not installed", MISSING)
        text = " ".join(str(error).split())
    # The loader names one library; more may be missing.
    missing = [library for library in LIBRARIES if library in text or not _loadable(library)]
    if missing:
        return Problem(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            f"apt install {' '.join(LIBRARIES[library] for library in missing)}",
        )
    return Problem(text, f"install the wheel that fits this machine: {MISSING}")


def _loadable(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
