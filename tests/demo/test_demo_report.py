"""Verdict and table: good runs pass, and everything that is not as promised is found."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from vcache.demo import main
from vcache.demo.cast import Run
from vcache.demo.report import problems, render, summary
from vcache.demo.stage import Stage
from vcache.demo.story import Results

PROMPT = [*range(5780), *[-1] * 20]
COLD = Run(5800, 0, 0, 0, 0, 0.0, 10.0, "periwinkle", [1, 2, 3], PROMPT)
HIT = COLD._replace(hit_tokens=5632, loaded_tokens=5632, load_bytes=5632 * 23040, load_seconds=0.05, first_token=0.5)
OWN = COLD._replace(own_tokens=5760, first_token=0.2)
FIRST = COLD._replace(prompt_ids=[*range(5780), *[-2] * 20])
GOOD = Results(FIRST, COLD, HIT, OWN, HIT)
TORCH = Results(
    FIRST._replace(logits_digest="cd", stored_bytes=1, store_seconds=0.1),
    COLD._replace(logits_digest="ab"),
    HIT._replace(logits_digest="ab", lookup_seconds=0.001),
    None,
    HIT._replace(logits_digest="ab"),
    "B",
)
"""As the demo's own engines tell it: no prefix cache of their own, but logits."""
GPU_COLD = COLD._replace(prompt_tokens=5805, prompt_ids=[*range(5785), *[-1] * 20], first_token=0.114)
GPU_HIT = GPU_COLD._replace(own_tokens=16, hit_tokens=5616, loaded_tokens=5616, first_token=0.113)
GPU = Results(
    FIRST._replace(prompt_tokens=5804, prompt_ids=[*range(5785), *[-2] * 19], own_tokens=16, first_token=0.095),
    GPU_COLD,
    GPU_HIT,
    GPU_COLD._replace(own_tokens=5792, first_token=0.095),
    GPU_HIT._replace(first_token=0.080),
)
"""As it ran on an H200, where vLLM's blocks have 16 tokens: the chat template was in the instances' own caches."""


@pytest.mark.parametrize(
    ("run", "changes", "text"),
    [
        ("first", {"own_tokens": 512}, "A, cold: not cold, 512 tokens were cached"),
        ("first", {"own_tokens": 256}, "A, cold: not cold, 256 tokens were cached"),
        ("first", {"hit_tokens": 256}, "A, cold: not cold, 256 tokens were cached"),
        ("control", {"own_tokens": 16}, "B without VCache: not cold, 16 tokens were cached"),
        ("control", {"hit_tokens": 5632, "loaded_tokens": 5632}, "B without VCache: not cold, 5,632 tokens"),
        ("shared", {"hit_tokens": 0, "loaded_tokens": 0}, "B through VCache: only 0 of 5,632 tokens were a hit"),
        ("shared", {"hit_tokens": 5376, "loaded_tokens": 5376}, "B through VCache: only 5,376 of 5,632 tokens were a hit"),
        ("shared", {"loaded_tokens": 256}, "B through VCache: only 256 of 5,632 tokens were loaded"),
        ("shared", {"own_tokens": 5632}, "B through VCache: proves nothing, 5,632 tokens"),
        ("shared", {"text": "tulip"}, "B through VCache: the answer differs from the one without VCache: 'tulip'"),
        ("shared", {"ids": [1, 2]}, "B through VCache: the answer differs"),
        ("own", {"own_tokens": 0}, "B once more: only 0 tokens were in its own prefix cache"),
        ("own", {"ids": [9]}, "B once more: the answer differs"),
        ("restarted", {"hit_tokens": 5120}, "A after the restart: only 5,120 of 5,632"),
        ("restarted", {"ids": []}, "A after the restart: the answer differs"),
    ],
)
def test_what_is_wrong_is_named(run: str, changes: dict[str, Any], text: str) -> None:
    assert problems(GOOD) == problems(TORCH) == []
    for results in (GOOD, TORCH):
        if getattr(results, run) is not None:
            found = problems(results._replace(**{run: getattr(results, run)._replace(**changes)}))
            assert len(found) == 1
            assert found[0].startswith(text.replace("A after", f"{results.last} after"))


def test_less_than_a_chunk_of_its_own_is_allowed_and_speed_plays_no_part() -> None:
    assert problems(GPU) == []
    assert problems(GPU._replace(shared=GPU_HIT._replace(own_tokens=240, hit_tokens=5392, loaded_tokens=5392))) == []
    slow = GPU._replace(shared=GPU_HIT._replace(first_token=9.0), restarted=GPU_HIT._replace(first_token=9.0))
    assert problems(slow) == []
    assert "times sooner" not in summary(slow)


@pytest.mark.parametrize("run", ["shared", "restarted"])
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"own_tokens": 256, "hit_tokens": 5376, "loaded_tokens": 5376},
            "proves nothing, 256 tokens were in the instance's own",
        ),
        ({"own_tokens": 5616, "hit_tokens": 16, "loaded_tokens": 16}, "proves nothing, 5,616 tokens"),
        ({"hit_tokens": 5360, "loaded_tokens": 5360}, "only 5,360 of 5,616 tokens were a hit"),
        ({"loaded_tokens": 5360}, "only 5,360 of 5,616 tokens were loaded"),
        ({"own_tokens": 0}, "only 5,616 of 5,632 tokens were a hit"),
    ],
)
def test_a_chunk_of_its_own_or_one_that_is_missing_fails(run: str, changes: dict[str, Any], text: str) -> None:
    (found,) = problems(GPU._replace(**{run: getattr(GPU, run)._replace(**changes)}))
    assert text in found


def test_prompts_that_have_no_chunk_in_common_prove_nothing() -> None:
    found = problems(GPU._replace(first=GPU.first._replace(prompt_ids=[])))
    assert found == ["A's and B's prompts begin with no chunk that is the same: there is nothing to share"]


@pytest.mark.parametrize("close", [True, False])
def test_why_times_are_close_is_said_only_where_they_are(close: bool) -> None:
    output = io.StringIO()
    assert main.verdict(Stage(Console(width=400, file=output)), GPU, close_times=close) == []
    assert ("--model NAME_OR_PATH" in output.getvalue()) == close


def test_the_table_has_every_number_and_fits_80_columns() -> None:
    output = io.StringIO()
    Console(width=80, file=output).print(render(GOOD._replace(restarted=HIT._replace(text="tulip")), "Measured somehow."))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = re.sub(r"[ \n]+", " ", output.getvalue())
    numbers = ("5,800", "5,632", "5,760", "10.00 s", "500 ms", "20.0 x", "50.0 x", "2.60", "124 MiB in 50 ms")
    for part in (*numbers, "yes", "NO", "Measured somehow."):
        assert part in text, part
    assert "B through VCache: periwinkle" in text
    assert "A: after kill -9 5,800 0 5,632 500 ms 20.0 x 2.60 NO" in text
    assert "B takes 10.00 s to the first token; with it 500 ms, 20.0 times sooner" in summary(GOOD)


def test_the_table_of_engines_without_a_cache_but_with_logits() -> None:
    output = io.StringIO()
    results = TORCH._replace(restarted=TORCH.restarted._replace(logits_digest="cd"))
    Console(width=80, file=output).print(render(results, "Measured somehow."))
    assert max(map(len, output.getvalue().splitlines())) <= 80
    text = re.sub(r"[ \n]+", " ", output.getvalue())
    for part in ("5,800", "5,632", "10.00 s", "500 ms", "20.0 x", "2.60", "Look-up: 1 ms", "124 MiB in 50 ms"):
        assert part in text, part
    assert "B: through VCache 5,800 5,632 500 ms 20.0 x 2.60 yes yes" in text
    # That logits differ is shown, and no failure: tokens are what is promised.
    assert "B: after kill -9 5,800 5,632 500 ms 20.0 x 2.60 yes NO" in text
    assert problems(results) == []
    assert "own" not in text.split("Where do")[0]
    assert "With the manager started anew, B takes 500 ms" in summary(TORCH)
