"""The checks behind `vcache doctor`: what they look like, and how they are run and printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import typer

from ..config import VCacheConfig

Status = Literal["ok", "warn", "fail"]

_COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "red"}


class Check(NamedTuple):
    """One line of `vcache doctor`. `fail`: something that was asked for, or that nothing works without, is missing."""

    name: str
    status: Status
    detail: str
    """What was found."""
    why: str = ""
    """Why it matters; empty when all is well."""
    advice: str = ""
    """What to do about it; empty when nothing."""


Checker = Callable[[VCacheConfig], Iterable[Check]]
"""Looks at one thing and yields its lines. May block for a second or two; reports what it cannot find out as a line."""


def run_checks(config: VCacheConfig, checkers: Iterable[Checker]) -> Iterator[Check]:
    """Run all checkers; yields each line as soon as it is known."""
    for checker in checkers:
        yield from checker(config)


def print_check(check: Check) -> None:
    """Print `ok    name: detail`; below it, where there is something to do, why it matters and what to do."""
    mark = typer.style(f"{check.status:<5}", fg=_COLOURS[check.status], bold=check.status != "ok")
    typer.echo(f"{mark} {check.name}: {check.detail}")
    if check.status == "ok":
        return
    for label, text in (("why", check.why), ("do", check.advice)):
        if text:
            typer.echo(f"        {label}: {text}")


def summary(checks: Iterable[Check]) -> str:
    """Count them: `12 ok, 2 warn, 0 fail`."""
    counts = Counter(check.status for check in checks)
    return ", ".join(f"{counts[status]} {status}" for status in _COLOURS)


def as_json(checks: Iterable[Check]) -> dict[str, Any]:
    """Make plain data of them, with whether one failed."""
    found = list(checks)
    return {"checks": [check._asdict() for check in found], "failed": any(check.status == "fail" for check in found)}
