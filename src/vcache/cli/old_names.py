"""Command lines that were written for older versions, as they are called now."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

TIERS = ("pool", "storage")


class Commands(TyperGroup):
    """The commands of `vcache`. `lend --tier storage` is `lend-storage`; `lend --tier pool` is `lend`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Choose the command that `args` begin with. Raises typer's usage errors."""
        if args[:1] == ["lend"]:
            args = self._lend(args[1:])
        return super().resolve_command(ctx, args)

    def _lend(self, args: list[str]) -> list[str]:
        tier, args = _without_tier(args)
        name, other, word = ("lend-storage", "lend", "without") if tier == "storage" else ("lend", "lend-storage", "with")
        foreign = self._options(other) - self._options(name)
        wrong = [option for option in (each.partition("=")[0] for each in args) if option in foreign]
        if wrong:
            raise typer.BadParameter(f"{', '.join(wrong)}: only {word} --tier storage, which is vcache lend-storage")
        return [name, *args]

    def _options(self, name: str) -> set[str]:
        return {option for parameter in self.commands[name].params for option in parameter.opts}


def _without_tier(args: list[str]) -> tuple[str, list[str]]:
    """The value of `--tier`, the last if there are several, and the other arguments."""
    tier, rest, words = "pool", list[str](), iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if option != "--tier":
            rest.append(word)
            continue
        tier = value if equals else next(words, "")
        if tier not in TIERS:
            raise typer.BadParameter(f"--tier {tier}: choose from {', '.join(TIERS)}")
    return tier, rest
