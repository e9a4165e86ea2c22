"""The demo's verdict and its table. Pure: from answers to text."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .messages import Answer

MARGIN = 2 * 256
"""Tokens at the end of a prompt that need not be a hit: the question, and the chunk that it makes unshareable."""


class Results(NamedTuple):
    """One answer for every run, in the order of the story."""

    first: Answer
    """Worker 1, first question, nothing stored yet."""
    control: Answer
    """Worker 2, second question, VCache not touched."""
    shared: Answer
    """Worker 2, second question, with what worker 1 stored."""
    restarted: Answer
    """The same after worker 1 and the manager were killed and the manager was started again."""


def problems(results: Results) -> list[str]:
    """Everything that is not as promised, a line each. Empty when the demo succeeded."""
    found = []
    runs = {"worker 2 through VCache": results.shared, "worker 2 after the restart": results.restarted}
    for name, run in runs.items():
        if run.hit_tokens <= run.prompt_tokens - MARGIN:
            found.append(f"{name}: only {run.hit_tokens:,} of {run.prompt_tokens:,} prompt tokens were a hit")
        if run.used_tokens <= run.prompt_tokens - MARGIN:
            found.append(f"{name}: only {run.used_tokens:,} of {run.hit_tokens:,} hit tokens were retrieved")
        if run.ids != results.control.ids:
            found.append(f"{name}: the answer differs from the one without a cache: {run.text!r}, not {results.control.text!r}")
    return found


def render(results: Results, labels: tuple[str, str], questions: tuple[str, str]) -> Group:
    """`labels`: worker 1 and worker 2 in words. The table, and the answers below it."""
    control = results.control
    table = Table(title="Two processes, one document", title_justify="left", header_style="bold")
    table.add_column("run")
    headings = ("prompt tokens", "hit tokens", "time to first token", "speed-up", "retrieve", "tokens equal", "logits equal")
    for heading in headings:
        table.add_column(heading, justify="right")
    rows = (
        (f"{labels[0]}\nfirst question, stores", results.first, False),
        (f"{labels[1]}\nsecond question, no cache", control, False),
        (f"{labels[1]}\nsecond question, VCache", results.shared, True),
        (f"{labels[1]}\nafter kill -9 and restart", results.restarted, True),
    )
    for name, run, cached in rows:
        speed_up = f"{control.first_token / run.first_token:.1f} x"
        equal = (_yes(run.ids == control.ids), _yes(run.logits_digest == control.logits_digest))
        compared = (speed_up, _speed(run), *equal) if cached else ("", "", "", "")
        hit = "not asked" if run is control else f"{run.hit_tokens:,}"
        table.add_row(name, f"{run.prompt_tokens:,}", hit, _seconds(run.first_token), *compared, end_section=True)
    return Group(table, *_answers(results, questions))


def _answers(results: Results, questions: tuple[str, str]) -> list[RenderableType]:
    lines = [
        (questions[0], "worker 1", results.first),
        (questions[1], "no cache", results.control),
        (questions[1], "VCache", results.shared),
        (questions[1], "restarted", results.restarted),
    ]
    return [
        Text.assemble((question, "bold"), (f"  {who}: ", "dim"), " ".join(run.text.split())) for question, who, run in lines
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def _speed(run: Answer) -> str:
    speed = run.retrieved_bytes / run.retrieve / 1e9
    return f"{speed:.2f} GB/s\n{run.retrieved_bytes / 2**20:,.0f} MiB in {_seconds(run.retrieve)}"


def _yes(equal: bool) -> Text:
    return Text("yes", "green") if equal else Text("NO", "bold red")
