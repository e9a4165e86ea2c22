"""Exit codes, and what every command does with errors: one line on stderr, never a traceback for a mistake of the user."""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable
from enum import IntEnum
from typing import ParamSpec, TypeVar

import typer

from ..errors import AddressInUseError, ArgumentError, ConfigError, ManagerUnavailableError, VCacheError
from ..logs import configure_logging, log_level

P = ParamSpec("P")
R = TypeVar("R")


class Exit(IntEnum):
    """Exit codes of all commands. Ctrl-C and SIGTERM are the normal end of `serve`, both `lend`s and `status --watch`: `OK`."""

    OK = 0
    FAILED = 1
    """A check failed, or VCache could not do what was asked."""
    USAGE = 2
    """Wrong options, configuration or address."""
    UNREACHABLE = 3
    """The manager cannot be reached."""
    INTERRUPTED = 130
    """Ctrl-C before the command had finished."""


def exit_code(error: VCacheError) -> Exit:
    """Choose the code for an error that ends a command."""
    if isinstance(error, ConfigError | ArgumentError | AddressInUseError):
        return Exit.USAGE
    return Exit.UNREACHABLE if isinstance(error, ManagerUnavailableError) else Exit.FAILED


def complain(text: str) -> None:
    """Print `error: text` in one line on stderr, red on a terminal."""
    line = " ".join(text.split())
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {typer.style(line, fg='red')}", err=True)


def fail(text: str, code: Exit = Exit.FAILED) -> typer.Exit:
    """Print the line; raise what this returns."""
    complain(text)
    return typer.Exit(code)


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Make a function a command: logging as `VCACHE_LOG_LEVEL` says, `VCacheError` as one line and an exit code.

    `VCACHE_LOG_LEVEL=DEBUG` adds the traceback. Any other exception is a bug in VCache and passes through unchanged.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            configure_logging()
            return command(*args, **kwargs)
        except VCacheError as error:
            if _debugging():
                traceback.print_exc()
            raise fail(str(error), exit_code(error)) from None
        except KeyboardInterrupt:
            raise typer.Exit(Exit.INTERRUPTED) from None

    return run


def _debugging() -> bool:
    try:
        return log_level() <= logging.DEBUG
    except ConfigError:  # the very error that is being reported
        return False
