"""The verdict: everything that is not as promised is found."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from rich.console import Console

from vcache.demo.messages import Answer
from vcache.demo.report import Results, problems, render

GOOD = Answer(
    prompt_tokens=5800,
    hit_tokens=5632,
    used_tokens=5632,
    ids=[1, 2, 3],
    text="periwinkle",
    first_token=0.5,
    logits_digest="ab",
    lookup=0.001,
    retrieve=0.05,
    retrieved_bytes=5632 * 23040,
    store=0.0,
    stored_bytes=0,
)
COLD = msgspec.structs.replace(GOOD, hit_tokens=0, used_tokens=0, first_token=10.0, retrieve=0.0, retrieved_bytes=0)


def results(**changes: Any) -> Results:
    return Results(COLD, msgspec.structs.replace(COLD), msgspec.structs.replace(GOOD, **changes), GOOD)


def test_a_good_run_has_no_problem() -> None:
    assert problems(results()) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hit_tokens": 0, "used_tokens": 0}, "only 0 of 5,800 prompt tokens were a hit"),
        ({"hit_tokens": 5120, "used_tokens": 5120}, "only 5,120 of 5,800 prompt tokens were a hit"),
        ({"used_tokens": 256}, "only 256 of 5,632 hit tokens were retrieved"),
        ({"ids": [1, 2, 4], "text": "tulip"}, "the answer differs from the one without a cache: 'tulip', not 'periwinkle'"),
        ({"ids": [1, 2]}, "the answer differs"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], text: str) -> None:
    found = problems(results(**changes))
    assert found
    assert all(line.startswith("worker 2 through VCache: ") for line in found)
    assert any(text in line for line in found)


def test_the_run_after_the_restart_is_judged_too() -> None:
    bad = results()._replace(restarted=COLD)
    assert {line.split(":")[0] for line in problems(bad)} == {"worker 2 after the restart"}


def test_the_table_has_every_number() -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(results(logits_digest="cd"), (16, 32), ("first?", "second?")))
    text = re.sub(r"[ \n]+", " ", console.export_text())
    for part in ("5,800", "5,632", "10.00 s", "500 ms", "20.0 x", "2.60", "124 MiB in 50 ms", "yes", "NO", "none"):
        assert part in text, part
    assert "second? VCache: periwinkle" in text
