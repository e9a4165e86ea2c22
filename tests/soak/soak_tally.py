"""What a soak has done and seen, and its summary."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from soak_checker import Read

COLUMNS = ("reached", "writer killed", "manager killed", "lender killed")


@dataclass
class Tally:
    """Counts only; `failed` decides the exit code."""

    rounds: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    windows: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(window, one of `COLUMNS`)."""
    asked: int = 0
    compared: int = 0
    """Tokens."""
    wrong: int = 0
    strays: int = 0
    exceptions: int = 0
    hangs: int = 0
    deaths: int = 0
    """Processes that ended although nobody killed them."""
    longest: dict[str, float] = field(default_factory=dict)
    """Seconds of the longest call of each function, without the time that it was halted."""

    @property
    def failures(self) -> int:
        return self.wrong + self.strays + self.exceptions + self.hangs + self.deaths

    @property
    def failed(self) -> bool:
        return self.failures > 0

    def ended(self, function: str, seconds: float) -> None:
        self.longest[function] = max(self.longest.get(function, 0.0), seconds)

    def read(self, read: Read) -> None:
        self.asked += read.asked
        self.compared += read.delivered
        self.wrong += len(read.wrong)
        self.strays += read.strays

    def summary(self, seconds: float) -> str:
        """Several lines."""
        lines = [
            f"{sum(self.rounds.values())} rounds in {seconds:.0f} s: {_list(self.rounds)}",
            f"{sum(self.calls.values())} calls: {_list(self.calls)}",
            f"longest, halts left out: {', '.join(f'{name} {longest:.1f} s' for name, longest in self.longest.items())}",
            f"{self.asked} tokens asked for, {self.compared} delivered and compared",
            "",
            "  ".join(("window".ljust(12), *COLUMNS)),
        ]
        for window in sorted({window for window, _ in self.windows}):
            numbers = [str(self.windows[window, column]).rjust(len(column)) for column in COLUMNS]
            lines.append("  ".join((window.ljust(12), *numbers)))
        lines += [
            "",
            f"wrong tokens {self.wrong}, stray rows {self.strays}, exceptions {self.exceptions}, hangs {self.hangs}, "
            f"unexpected deaths {self.deaths}: {'FAILED' if self.failed else 'clean'}",
        ]
        return "\n".join(lines)


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
