"""Names of chunks are remembered between calls, and are those that a fresh look at the tokens gives."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.keys import TokenDatabase
from vcache.prompt import RECENT_PROMPTS, Prompt, RecentPrompts

SIZE = 4
NAMESPACE = b"namespace-16-byt"


@st.composite
def conversations(draw: st.DrawFn) -> list[list[int]]:
    """Prompts that begin alike, continue each other, repeat, or differ in one token."""
    prompts: list[list[int]] = []
    for _ in range(draw(st.integers(1, 10))):
        base = draw(st.sampled_from(prompts)) if prompts and draw(st.booleans()) else []
        kept = base[: draw(st.integers(0, len(base)))]
        prompts.append(kept + draw(st.lists(st.integers(0, 2), max_size=30)))
    return prompts


@settings(max_examples=300, deadline=None)
@given(conversations(), st.booleans())
def test_remembered_names_are_the_right_ones(prompts: list[list[int]], partial: bool) -> None:
    database = TokenDatabase(NAMESPACE, SIZE, partial=partial)
    recent = RecentPrompts(SIZE)
    for tokens in prompts:
        ids = array("I", tokens)
        prompt = Prompt(database, ids, recent=recent)
        assert prompt.digests() == [span.digest for span in database.spans(ids)]


def named(database: TokenDatabase, recent: RecentPrompts, tokens: list[int]) -> int:
    """Chunks of a prompt that must be named anew; names them."""
    prompt = Prompt(database, array("I", tokens), recent=recent)
    missing = prompt.unnamed(0)
    prompt.digests()
    return missing


@pytest.mark.parametrize(
    ("second", "missing"),
    [
        (list(range(42)), 0),
        (list(range(40)), 0),
        (list(range(43)), 1),
        (list(range(80)), 10),
        ([*range(17), 99, *range(18, 42)], 7),
        ([99, *range(1, 42)], 11),
        ([], 0),
    ],
    ids=["the same", "shorter", "longer by a token", "continued", "another middle", "another beginning", "empty"],
)
def test_only_what_is_new_is_named(second: list[int], missing: int) -> None:
    database, recent = TokenDatabase(NAMESPACE, SIZE), RecentPrompts(SIZE)
    assert named(database, recent, list(range(42))) == 11
    assert named(database, recent, second) == missing


def test_a_continued_prompt_takes_the_place_of_its_beginning_and_old_ones_go() -> None:
    database, recent = TokenDatabase(NAMESPACE, SIZE), RecentPrompts(SIZE)
    for length in (8, 16, 24):
        named(database, recent, [7] * length)
    for first in range(RECENT_PROMPTS - 1):
        named(database, recent, [first] * 8)
    assert named(database, recent, [7] * 24) == 0
    named(database, recent, [100] * 8)
    named(database, recent, [101] * 8)
    assert named(database, recent, [0] * 8) == 2


def test_a_prompt_that_is_named_in_part_only_is_not_remembered() -> None:
    """Its names would be taken for all there are."""
    database, recent = TokenDatabase(NAMESPACE, SIZE), RecentPrompts(SIZE)
    prompt = Prompt(database, array("I", range(40)), recent=recent)
    prompt.chunks(0, 3)
    assert prompt.unnamed(0) == 7
    assert named(database, recent, list(range(40))) == 10
