"""Verdict and table of the demo. Pure: from runs to text."""

from __future__ import annotations

from itertools import takewhile

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import document
from .cast import Run
from .story import CHUNK, Results, whole_chunks

MARGIN = 2 * CHUNK
"""Tokens at the end of a prompt that need not be in an engine's own prefix cache: the question, and a block that it ends."""
CLOSE_TIMES = (
    "The times are close because a GPU computes this prompt of a model of 135M parameters within tens of milliseconds; "
    "the rest is HTTP and tokenizing. A larger model shows the effect: --model NAME_OR_PATH."
)


def problems(results: Results) -> list[str]:
    """List everything that is not as promised, a line each. Empty when the demo succeeded; how fast it was plays no part.

    An engine may have less than a chunk of its own, such as the chat template: no whole chunk can have come from there.
    """
    control = results.control
    found = []
    # Under the salt of the control, nothing at all is cached.
    for name, run, allowed in (("A, cold", results.first, CHUNK - 1), ("B without VCache", control, 0)):
        if run.own_tokens > allowed or run.hit_tokens or run.loaded_tokens:
            found.append(f"{name}: not cold, {run.own_tokens + max(run.hit_tokens, run.loaded_tokens):,} tokens were cached")
    shareable = shareable_tokens(results)
    if not shareable:
        found.append("A's and B's prompts begin with no chunk that is the same: there is nothing to share")
    shared = {"B through VCache": results.shared, f"{results.last} after the restart": results.restarted}
    for name, run in shared.items():
        due = shareable - run.own_tokens
        if run.own_tokens >= CHUNK:
            found.append(f"{name}: proves nothing, {run.own_tokens:,} tokens were in the instance's own prefix cache")
        elif run.hit_tokens < due:
            found.append(f"{name}: only {run.hit_tokens:,} of {due:,} tokens were a hit")
        elif run.loaded_tokens < due:
            found.append(f"{name}: only {run.loaded_tokens:,} of {due:,} tokens were loaded")
    if results.own is not None:
        shared["B once more"] = results.own
        if results.own.own_tokens <= results.own.prompt_tokens - MARGIN:
            found.append(f"B once more: only {results.own.own_tokens:,} tokens were in its own prefix cache")
    for name, run in shared.items():
        if not _equal(run, control):
            found.append(f"{name}: the answer differs from the one without VCache: {run.text!r}, not {control.text!r}")
    return found


def render(results: Results, measured: str) -> Group:
    """Draw the table, what stands behind its numbers (`Cast.measured`), and the answers. Fits 80 columns."""
    control, shared = results.control, results.shared
    own = [("B: own prefix cache", results.own, True)] if results.own is not None else []
    rows: list[tuple[str, Run, bool]] = [
        ("A: cold, stores", results.first, False),
        ("B: without VCache", control, False),
        ("B: through VCache", shared, True),
        *own,
        (f"{results.last}: after kill -9", results.restarted, True),
    ]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("run", no_wrap=True)
    headings = ["prompt\ntokens", *(["own\nhit"] if own else []), "VCache\nhit", "first\ntoken", "speed\nup", "load\nGB/s"]
    for heading in (*headings, "text\nequal", *(["logits\nequal"] if control.logits_digest else [])):
        table.add_column(heading, justify="right")
    for name, run, compared in rows:
        cells: list[str | Text] = [name, f"{run.prompt_tokens:,}"]
        cells += [f"{run.own_tokens:,}"] if own else []
        cells += [f"{run.loaded_tokens:,}", seconds(run.first_token)]
        cells += [f"{_speed(results, run):.1f} x" if compared else ""]
        cells += [f"{run.load_bytes / run.load_seconds / 1e9:.2f}" if run.load_seconds else ""]
        cells += [_yes_or_no(_equal(run, control)) if compared else ""]
        if control.logits_digest:
            cells += [_yes_or_no(run.logits_digest == control.logits_digest) if compared else ""]
        table.add_row(*cells)
    lookup = f"Look-up: {seconds(shared.lookup_seconds)}. " if shared.lookup_seconds else ""
    notes = f"{measured} {lookup}Load: {shared.load_bytes / 2**20:,.0f} MiB in {seconds(shared.load_seconds)}."
    return Group(table, Text(notes, "dim"), Text(), *_answers(results), Text())


def shareable_tokens(results: Results) -> int:
    """Count the tokens of the whole chunks with which both questions' prompts begin: what A stored and B can use."""
    pairs = zip(results.first.prompt_ids, results.control.prompt_ids, strict=False)
    return whole_chunks(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))) * CHUNK


def summary(results: Results) -> str:
    """Tell the result of a demo without problems, in three sentences."""
    control, shared = results.control, results.shared
    faster = _speed(results, shared)
    sooner = f", {faster:.1f} times sooner" if faster >= 1.1 else ""
    last = "A, killed and started anew," if results.last == "A" else "With the manager started anew, B"
    return (
        f"Without VCache, B takes {seconds(control.first_token)} to the first token; with it {seconds(shared.first_token)}"
        f"{sooner}. {last} takes {seconds(results.restarted.first_token)}. "
        f"All answers to the same question are equal{', token by token' if control.ids else ''}."
    )


def seconds(value: float) -> str:
    """Write a duration for a table."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def _answers(results: Results) -> list[RenderableType]:
    first, second = document.FIRST_QUESTION.text, document.SECOND_QUESTION.text
    lines = (
        (first, "A", results.first),
        (second, "B without VCache", results.control),
        (second, "B through VCache", results.shared),
        (second, f"{results.last} after kill -9", results.restarted),
    )
    return [
        Text.assemble((question, "bold"), (f"  {who}: ", "dim"), " ".join(run.text.split())) for question, who, run in lines
    ]


def _equal(run: Run, control: Run) -> bool:
    return (run.text, run.ids) == (control.text, control.ids)


def _speed(results: Results, run: Run) -> float:
    """How many times sooner the first token came than without VCache."""
    return results.control.first_token / run.first_token


def _yes_or_no(equal: bool) -> Text:
    """`yes`, or a `NO` that cannot be missed."""
    return Text("yes", "green") if equal else Text("NO", "bold red")
