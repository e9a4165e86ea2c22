"""The document: as long as asked for, the same every time, facts where a reader can share them."""

from __future__ import annotations

import pytest

from vcache.demo.document import FIRST_QUESTION, MAX_TOKENS, MIN_TOKENS, SECOND_QUESTION, build, station


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("tokens", [MIN_TOKENS, 3000, MAX_TOKENS])
def test_it_fills_the_length_asked_for_and_no_more(tokens: int) -> None:
    book = build(tokens, words)
    chapter = max(words(part) for part in book.text.split("Chapter ")[1:-1])
    assert tokens - chapter < words(book.text) <= tokens
    assert book.text.count("\nChapter ") == book.chapters


def test_it_is_the_same_every_time() -> None:
    assert build(2000, words) == build(2000, words)


def test_facts_of_stations_differ_and_appear_in_their_chapter() -> None:
    text = build(6000, words).text
    stations = [station(number) for number in range(1, 40)]
    assert len({each.name for each in stations}) == len({each.keeper for each in stations}) == len(stations)
    for each in stations:
        assert f"The keeper of {each.name} is {each.keeper}, who answers on radio channel {each.channel}." in text


@pytest.mark.parametrize("question", [FIRST_QUESTION, SECOND_QUESTION])
def test_the_answer_stands_once_and_before_the_last_chunk(question: object) -> None:
    text = build(MIN_TOKENS, words).text
    fact = question.fact  # type: ignore[attr-defined]
    assert text.count(fact) == 1
    # English needs more tokens than words: 220 words after the fact are more than one chunk of 256 tokens.
    assert words(text[text.index(fact) :]) > 220
