"""The load of `vcache bench serve`: conversations that share system prompts; a turn is asked when the one before is answered.

No clock, no network, no state but whose turn it is. Everything follows from the seed: prompts, lengths, order, and where each
request goes. Only the answers come from outside; they are part of the next prompt, as in a chat.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..errors import ArgumentError

TOKENS = range(300, 1000)
"""Token ids that prompts are made of: plain ones in the vocabularies in use, and in those of tiny test models."""

Routing = Literal["random", "round-robin", "prefix-aware"]


class Shape(NamedTuple):
    """How large the load is. Lengths are means, in tokens."""

    conversations: int = 48
    turns: int = 5
    systems: int = 12
    """System prompts; as many conversations begin with each of them, or one more."""
    system_tokens: int = 6000
    turn_tokens: int = 1500
    """What a user adds in a turn."""
    answer_tokens: int = 64
    spread: float = 0.25
    """Lengths differ by up to this share of their mean, evenly."""
    concurrency: int = 12
    """Conversations under way at a time."""
    seed: int = 0


class Request(NamedTuple):
    """One turn of a conversation. `turn`: from 0; `instance`: where it goes."""

    conversation: int
    turn: int
    prompt: list[int]
    answer_tokens: int
    instance: int


class Load:
    """Hands out requests: `first` those that start the run, `after` the one that follows a finished one. Not thread-safe."""

    def __init__(self, shape: Shape, instances: int, routing: Routing) -> None:
        """Raises `ArgumentError` for numbers that make no load."""
        counts = (shape.conversations, shape.turns, shape.systems, shape.turn_tokens, shape.answer_tokens, shape.concurrency)
        if min(*counts, instances) < 1 or shape.system_tokens < 0 or not 0 <= shape.spread < 1:
            raise ArgumentError(f"no such load: {shape} on {instances} instances")
        self._shape, self._instances, self._routing = shape, instances, routing
        self._systems = [self._draw(f"system {number}", shape.system_tokens) for number in range(shape.systems)]
        self._system_of = [number % shape.systems for number in range(shape.conversations)]
        random.Random(f"{shape.seed}: order").shuffle(self._system_of)
        self._waiting = deque(range(shape.conversations))

    @property
    def requests(self) -> int:
        """How many requests there are in all."""
        return self._shape.conversations * self._shape.turns

    @property
    def longest(self) -> int:
        """Tokens that the longest prompt with its answer can have."""
        turn = _longest(self._shape.turn_tokens, self._shape) + _longest(self._shape.answer_tokens, self._shape)
        return _longest(self._shape.system_tokens, self._shape) + self._shape.turns * turn

    def first(self) -> list[Request]:
        """Start as many conversations as run at a time."""
        started = (self._begin() for _ in range(self._shape.concurrency))
        return [request for request in started if request is not None]

    def after(self, request: Request, answer: Sequence[int]) -> Request | None:
        """Go on in place of a finished request: with the next turn of its conversation, else with the next conversation, else
        not at all. `answer`: its tokens; empty if the server does not tell them: others stand for them then."""
        conversation, turn = request.conversation, request.turn + 1
        if turn == self._shape.turns:
            return self._begin()
        said = list(answer) or self._tokens(f"answer {conversation}.{request.turn}", request.answer_tokens)
        return self._request(conversation, turn, request.prompt + said)

    def warm_up(self, number: int, instance: int) -> Request:
        """A request as long as a first turn. Its prompt shares nothing with the load or another `number`."""
        prompt = self._tokens(f"warm-up {number}", self._shape.system_tokens + self._shape.turn_tokens)
        return Request(-1, 0, prompt, self._shape.answer_tokens, instance)

    def _begin(self) -> Request | None:
        if not self._waiting:
            return None
        conversation = self._waiting.popleft()
        return self._request(conversation, 0, self._systems[self._system_of[conversation]])

    def _request(self, conversation: int, turn: int, history: list[int]) -> Request:
        name = f"{conversation}.{turn}"
        answer = self._length(f"answer length {name}", self._shape.answer_tokens)
        prompt = history + self._draw(f"turn {name}", self._shape.turn_tokens)
        return Request(conversation, turn, prompt, answer, self._route(conversation, turn))

    def _route(self, conversation: int, turn: int) -> int:
        """`prefix-aware`: by the system prompt, so that conversations stay where their beginning is; by the conversation where
        there are fewer system prompts than instances. `round-robin`: the next instance in each turn."""
        match self._routing:
            case "random":
                return random.Random(f"{self._shape.seed}: route {conversation}.{turn}").randrange(self._instances)
            case "round-robin":
                return (conversation + turn) % self._instances
            case "prefix-aware":
                few = self._shape.systems < self._instances
                return (conversation if few else self._system_of[conversation]) % self._instances

    def _draw(self, name: str, mean: int) -> list[int]:
        return self._tokens(name, self._length(f"length of {name}", mean))

    def _tokens(self, name: str, count: int) -> list[int]:
        return random.Random(f"{self._shape.seed}: {name}").choices(TOKENS, k=count)

    def _length(self, name: str, mean: int) -> int:
        """Never above `_longest`; at least 1 for a mean of 1 or more."""
        share = random.Random(f"{self._shape.seed}: {name}").uniform(-self._shape.spread, self._shape.spread)
        return max(min(mean, 1), int(mean * (1 + share)))


def _longest(mean: int, shape: Shape) -> int:
    return max(min(mean, 1), int(mean * (1 + shape.spread)))
