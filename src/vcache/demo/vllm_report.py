"""Verdict and table of the demo with vLLM. Pure: from runs to text."""

from __future__ import annotations

from itertools import takewhile

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..config import CacheConfig
from . import document
from .report import MARGIN, seconds, yes_or_no
from .vllm_instance import Run
from .vllm_pool import whole_chunks
from .vllm_scenario import Results

CHUNK = CacheConfig().chunk_size
CLOSE_TIMES = (
    "The times are close because a GPU computes this prompt of a model of 135M parameters within tens of milliseconds; "
    "the rest is HTTP and tokenizing. A larger model shows the effect: --model NAME_OR_PATH."
)


def problems(results: Results) -> list[str]:
    """Everything that is not as promised, a line each. Empty when the demo succeeded; how fast it was plays no part.

    An instance may have less than a chunk of its own, such as the chat template: no whole chunk can have come from there.
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
    for name, run in {"B through VCache": results.shared, "A after the restart": results.restarted}.items():
        due = shareable - run.own_tokens
        if run.own_tokens >= CHUNK:
            found.append(f"{name}: proves nothing, {run.own_tokens:,} tokens were in the instance's own prefix cache")
        elif run.hit_tokens < due:
            found.append(f"{name}: only {run.hit_tokens:,} of {due:,} tokens were a hit")
        elif run.loaded_tokens < due:
            found.append(f"{name}: only {run.loaded_tokens:,} of {due:,} tokens were loaded")
    if results.own.own_tokens <= results.own.prompt_tokens - MARGIN:
        found.append(f"B once more: only {results.own.own_tokens:,} tokens were in its own prefix cache")
    for name, run in {
        "B through VCache": results.shared,
        "B once more": results.own,
        "A after the restart": results.restarted,
    }.items():
        if (run.text, run.ids) != (control.text, control.ids):
            found.append(f"{name}: the answer differs from the one without VCache: {run.text!r}, not {control.text!r}")
    return found


def render(results: Results) -> Group:
    """The table, what stands behind its numbers, and the answers. Fits 80 columns."""
    control = results.control
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("run", no_wrap=True)
    for heading in ("prompt\ntokens", "own\nhit", "VCache\nhit", "first\ntoken", "speed\nup", "load\nGB/s", "text\nequal"):
        table.add_column(heading, justify="right")
    rows = (
        ("A: cold, stores", results.first, False),
        ("B: without VCache", control, False),
        ("B: through VCache", results.shared, True),
        ("B: own prefix cache", results.own, True),
        ("A: after kill -9", results.restarted, True),
    )
    for name, run, compared in rows:
        speed_up = f"{speed(results, run):.1f} x" if compared else ""
        equal = yes_or_no((run.text, run.ids) == (control.text, control.ids)) if compared else ""
        rate = f"{run.load_bytes / run.load_seconds / 1e9:.2f}" if run.load_seconds else ""
        table.add_row(
            name,
            f"{run.prompt_tokens:,}",
            f"{run.own_tokens:,}",
            f"{run.loaded_tokens:,}",
            seconds(run.first_token),
            speed_up,
            rate,
            equal,
        )
    notes = (
        "first token: measured in the client, from sending the request to the first piece of text in the stream. Hits: vLLM's "
        "and VCache's own counters. Without VCache: the same request with a cache_salt, which nothing cached has. "
        f"Load: {results.shared.load_bytes / 2**20:,.0f} MiB in {seconds(results.shared.load_seconds)}."
    )
    return Group(table, Text(notes, "dim"), Text(), *_answers(results), Text())


def shareable_tokens(results: Results) -> int:
    """Tokens of the whole chunks with which both questions' prompts begin: what A stored and B can use."""
    pairs = zip(results.first.prompt_ids, results.control.prompt_ids, strict=False)
    return whole_chunks(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))) * CHUNK


def speed(results: Results, run: Run) -> float:
    """How many times sooner the first token came than without VCache."""
    return results.control.first_token / run.first_token


def summary(results: Results) -> str:
    """The result of a demo without problems, in three sentences."""
    control, shared, again = results.control, results.shared, results.restarted
    faster = speed(results, shared)
    sooner = f", {faster:.1f} times sooner" if faster >= 1.1 else ""
    return (
        f"Without VCache, B takes {seconds(control.first_token)} to the first token; with it {seconds(shared.first_token)}"
        f"{sooner}. A, killed and started anew, takes {seconds(again.first_token)}. "
        f"All answers to the same question are equal{', token by token' if control.ids else ''}."
    )


def _answers(results: Results) -> list[RenderableType]:
    first, second = document.FIRST_QUESTION.text, document.SECOND_QUESTION.text
    lines = (
        (first, "A", results.first),
        (second, "B without VCache", results.control),
        (second, "B through VCache", results.shared),
        (second, "A after kill -9", results.restarted),
    )
    return [
        Text.assemble((question, "bold"), (f"  {who}: ", "dim"), " ".join(run.text.split())) for question, who, run in lines
    ]
