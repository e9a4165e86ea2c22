"""The demo's verdict and its table. Pure: from answers to text."""

from __future__ import annotations

from typing import NamedTuple

from rich import box
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


def render(results: Results, block_sizes: tuple[int, int], questions: tuple[str, str]) -> Group:
    """The table, what stands behind its numbers, and the answers. Fits 80 columns."""
    control = results.control
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("run", no_wrap=True)
    for heading in (
        "prompt\ntokens",
        "hit\ntokens",
        "first\ntoken",
        "speed\nup",
        "retrieve\nGB/s",
        "tokens\nequal",
        "logits\nequal",
    ):
        table.add_column(heading, justify="right")
    rows = (
        ("worker 1: stores", results.first, False),
        ("worker 2: no cache", control, False),
        ("worker 2: VCache", results.shared, True),
        ("after the kill -9", results.restarted, True),
    )
    for name, run, cached in rows:
        speed_up = f"{control.first_token / run.first_token:.1f} x"
        equal = (yes_or_no(run.ids == control.ids), yes_or_no(run.logits_digest == control.logits_digest))
        compared = (speed_up, _speed(run), *equal) if cached else ("", "", "", "")
        hit = "none" if run is control else f"{run.hit_tokens:,}"
        table.add_row(name, f"{run.prompt_tokens:,}", hit, seconds(run.first_token), *compared)
    shared = results.shared
    notes = (
        f"first token: from the prompt's token ids, look-up ({seconds(shared.lookup)}) and retrieve "
        f"({shared.retrieved_bytes / 2**20:,.0f} MiB in {seconds(shared.retrieve)}) included. "
        f"Paged caches: blocks of {block_sizes[0]} tokens in worker 1, of {block_sizes[1]} in worker 2."
    )
    return Group(table, Text(notes, "dim"), Text(), *_answers(results, questions), Text())


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


def seconds(value: float) -> str:
    """A duration for a table."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def _speed(run: Answer) -> str:
    return f"{run.retrieved_bytes / run.retrieve / 1e9:.2f}"


def yes_or_no(equal: bool) -> Text:
    """`yes`, or a `NO` that cannot be missed."""
    return Text("yes", "green") if equal else Text("NO", "bold red")
