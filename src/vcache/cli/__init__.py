"""The command `vcache`. Starts in milliseconds: everything heavy is imported inside the command that needs it."""

from __future__ import annotations


def main() -> None:
    """Entry point of the console script. Exits the process with one of the codes of `cli.exits`."""
    from .app import app

    app(prog_name="vcache")


__all__ = ["main"]
