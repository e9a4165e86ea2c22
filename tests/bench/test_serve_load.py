"""The load of `bench serve`: reproducible, and shared as promised."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from vcache.bench.serve_load import TOKENS, Load, Request, Routing, Shape
from vcache.errors import ArgumentError

SHAPE = Shape(
    conversations=10, turns=3, systems=4, system_tokens=50, turn_tokens=20, answer_tokens=5, spread=0.3, concurrency=4, seed=7
)


def played(load: Load, *, newest_first: bool = False) -> list[Request]:
    """All requests, each answered with the number of its conversation and turn, oldest or newest of those under way first."""
    running, seen = load.first(), []
    while running:
        request = running.pop(-1 if newest_first else 0)
        seen.append(request)
        if (following := load.after(request, [request.conversation, request.turn])) is not None:
            running.append(following)
    return seen


@pytest.mark.parametrize("routing", ["random", "round-robin", "prefix-aware"])
def test_the_same_seed_gives_the_same_requests_in_whatever_order_they_end(routing: Routing) -> None:
    one, again = played(Load(SHAPE, 3, routing)), played(Load(SHAPE, 3, routing))
    assert one == again
    assert sorted(one) == sorted(played(Load(SHAPE, 3, routing), newest_first=True))
    other = played(Load(SHAPE._replace(seed=8), 3, routing))
    assert not {tuple(request.prompt[:20]) for request in one} & {tuple(request.prompt[:20]) for request in other}


def test_every_turn_is_asked_once_and_continues_the_one_before() -> None:
    load = Load(SHAPE, 2, "random")
    seen = played(load)
    assert len(seen) == load.requests == 30
    turns: dict[int, list[Request]] = defaultdict(list)
    for request in seen:
        turns[request.conversation].append(request)
    for number, requests in turns.items():
        assert [request.turn for request in requests] == [0, 1, 2]
        for before, after in pairwise(requests):
            answer = [number, before.turn]
            assert after.prompt[: len(before.prompt) + 2] == before.prompt + answer
            assert 14 <= len(after.prompt) - len(before.prompt) - 2 <= 26
        assert all(3 <= request.answer_tokens <= 6 for request in requests)
        assert len(requests[-1].prompt) + requests[-1].answer_tokens <= load.longest


def test_as_many_conversations_begin_with_each_system_prompt_or_one_more() -> None:
    firsts = [request.prompt for request in played(Load(SHAPE, 2, "random")) if request.turn == 0]
    shared = Counter(tuple(prompt[:35]) for prompt in firsts)  # a system prompt has at least 0.7 x 50 tokens
    assert sorted(shared.values()) == [2, 2, 3, 3]
    assert len({tuple(prompt) for prompt in firsts}) == 10


def test_no_more_conversations_are_under_way_than_asked_for() -> None:
    load = Load(SHAPE, 2, "random")
    running = load.first()
    assert [request.conversation for request in running] == [0, 1, 2, 3]
    following = load.after(running[2], [1])
    assert following is not None
    assert (following.conversation, following.turn) == (2, 1)
    last = following._replace(turn=2)
    begun = load.after(last, [1])
    assert begun is not None
    assert (begun.conversation, begun.turn) == (4, 0)
    assert len(Load(SHAPE._replace(concurrency=100), 2, "random").first()) == 10


def test_an_answer_that_is_not_told_is_stood_for() -> None:
    load, again = Load(SHAPE, 2, "random"), Load(SHAPE, 2, "random")
    request = load.first()[0]
    following, same = load.after(request, []), again.after(request, [])
    assert following is not None
    assert following == same
    stand_in = following.prompt[len(request.prompt) : len(request.prompt) + request.answer_tokens]
    assert all(token in TOKENS for token in stand_in)


def test_routing() -> None:
    def homes(routing: Routing, shape: Shape = SHAPE) -> dict[int, list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for request in played(Load(shape, 3, routing)):
            found[request.conversation].append(request.instance)
        return found

    assert {instance for each in homes("random").values() for instance in each} == {0, 1, 2}
    assert all(sorted(each) == [0, 1, 2] for each in homes("round-robin").values())
    assert all(len(set(each)) == 1 for each in homes("prefix-aware").values())
    by_system: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for request in played(Load(SHAPE, 3, "prefix-aware")):
        by_system[tuple(request.prompt[:35])].add(request.instance)
    assert all(len(found) == 1 for found in by_system.values())
    few = homes("prefix-aware", SHAPE._replace(systems=1))
    assert {each[0] for each in few.values()} == {0, 1, 2}
    assert all(len(set(each)) == 1 for each in few.values())


def test_without_a_system_prompt_or_a_spread() -> None:
    seen = played(Load(SHAPE._replace(system_tokens=0, spread=0.0), 1, "random"))
    assert {len(request.prompt) for request in seen if request.turn == 0} == {20}
    assert {request.answer_tokens for request in seen} == {5}


@pytest.mark.parametrize("wrong", [{"turns": 0}, {"systems": 0}, {"spread": 1.0}, {"system_tokens": -1}, {"concurrency": 0}])
def test_numbers_that_make_no_load_are_an_error(wrong: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match="no such load"):
        Load(SHAPE._replace(**wrong), 2, "random")


def test_the_warm_up_shares_nothing_with_the_load_and_fits() -> None:
    shape = SHAPE._replace(spread=0.0, turns=1)
    load = Load(shape, 2, "random")
    warm = [load.warm_up(number, 1) for number in range(3)]
    starts = {tuple(request.prompt[:16]) for request in (*warm, *played(load))}
    assert len(starts) == 3 + shape.systems
    assert all(len(request.prompt) + request.answer_tokens <= load.longest for request in warm)
    assert {request.instance for request in warm} == {1}
