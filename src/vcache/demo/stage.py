"""What the demo shows while it runs: a line for every step done, and a moving bar where something takes long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Step:
    """A step under way; `note` adds a line below the one that is printed when it is done."""

    def __init__(self, bar: Progress, text: str) -> None:
        self._bar = bar
        self._task = bar.add_task(text, total=None)
        self.notes: list[str] = []

    def moved(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Stage:
    """Prints to one console. Bars only on a terminal; elsewhere a line for each step done."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._step: Step | None = None

    def moved(self, done: int, total: int) -> None:
        """Move the bar of the step under way, if any."""
        if self._step is not None:
            self._step.moved(done, total)

    @contextmanager
    def step(self, text: str) -> Iterator[Step]:
        """A step that lasts as long as the block. Prints nothing more when the block raises."""
        began = time.monotonic()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            step = self._step = Step(bar, text)
            yield step
        self.console.print(f"[green]done[/green] {time.monotonic() - began:5.1f} s  {text}", highlight=False)
        for note in step.notes:
            self.console.print(f"              [dim]{note}[/dim]", highlight=False)
