"""The demo's story, step by step, over real processes: one told for every cast."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ..config import CacheConfig
from . import DemoError, document
from .cast import Cast, Player, Run
from .processes import poll
from .stage import Stage, Step

CHUNK = CacheConfig().chunk_size
SALT = "without VCache"
"""The salt of the run that must find nothing: nothing else is stored under it."""
WARM_UP = "warm-up"
"""The salt of the questions that warm up: else the chat template, with which all prompts begin, would be cached."""
BACK = 60.0
"""Seconds within which a hit must be back after the manager was started anew."""


class SharedPool(Protocol):
    """What the story needs of a `Pool`."""

    lent: str

    def start(self) -> None: ...
    def start_manager(self) -> None: ...
    def kill_manager(self) -> None: ...
    def wait_for_chunks(self, wanted: int) -> None: ...


class Results(NamedTuple):
    """One answer for every run, in the order of the story."""

    first: Run
    """A, first question, nothing stored yet."""
    control: Run
    """B, second question, under a salt: nothing of it is cached anywhere."""
    shared: Run
    """B, second question, with what A stored."""
    own: Run | None
    """The same once more, when B now has it in a prefix cache of its own."""
    restarted: Run
    """The second question after A and the manager were killed and the manager was started anew."""
    last: str = "A"
    """Who answered it: A, started anew, or B, which went on."""


def play(stage: Stage, pool: SharedPool, cast: Cast, tokens: int) -> Results:
    """Run everything, with a document of about `tokens` tokens. Raises `DemoError`. Blocks for one to four minutes.

    Engines start at the same time; while one is measured the other is idle.
    """
    with stage.step("start a manager and a lender") as step:
        pool.start()
        step.note(f"{pool.lent} lent")
    with stage.step(f"start {cast.engines} A and B") as step:
        a, b = cast.start(0), cast.start(1)
        for player in (a, b):
            player.wait_ready()
        step.note(f"processes {a.pid} and {b.pid}")
    with stage.step("both answer something short, to warm up") as step:
        book = document.build(tokens, a.count)
        warm = [_warm_up(player) for player in (a, b)]
        step.note(f"the document has {book.chapters} chapters")
    question = prompt(book, document.SECOND_QUESTION)
    with stage.step("A reads the document and answers; its KV goes to the pool") as step:
        first = a.ask(prompt(book, document.FIRST_QUESTION))
        # Of a long template, the warm-up stored chunks too.
        chunks = whole_chunks(first.prompt_tokens) + whole_chunks(warm[0].prompt_tokens)
        pool.wait_for_chunks(chunks)
        stored = f": {first.stored_bytes / 2**20:.0f} MiB in {first.store_seconds * 1000:.0f} ms" if first.stored_bytes else ""
        step.note(f"{chunks} chunks are in the pool{stored}")
    with stage.step("B answers another question without VCache"):
        control = b.ask(question, salt=SALT)
    with stage.step("B answers it with the KV that A computed"):
        shared = b.ask(question)
    own = None
    if cast.own_cache:
        with stage.step("B answers it once more, from its own prefix cache"):
            own = b.ask(question)
    with stage.step("kill -9 A and the manager") as step:
        killed = a.pid
        a.kill()
        pool.kill_manager()
        _miss(b, question, step)
    with stage.step(f"start {'both' if cast.own_cache else 'a manager'} anew; the lender reports to it") as step:
        pool.start_manager()
        if cast.own_cache:
            last = cast.start(0)
            last.wait_ready()
            pool.wait_for_chunks(chunks)
            _warm_up(last)
            step.note(f"process {last.pid} instead of {killed}")
        else:
            last = b
            _hit_again(b, question, shared.hit_tokens, step)
    name = "A" if cast.own_cache else "B"
    with stage.step(f"{name} answers the question again, with the KV that A computed before"):
        restarted = last.ask(question)
    return Results(first, control, shared, own, restarted, name)


def prompt(book: document.Document, question: document.Question) -> str:
    return f"{book.text}\n\nQuestion: {question.text}"


def whole_chunks(tokens: int) -> int:
    """Count the chunks that a prompt of `tokens` tokens fills. Pure."""
    return tokens // CHUNK


def _warm_up(player: Player) -> Run:
    return player.ask("What is the capital of France?", salt=WARM_UP, max_tokens=4)


def _miss(player: Player, question: str, step: Step) -> None:
    """Look a stored prompt up without a manager, where the engine lets us. Raises `DemoError` for anything but a miss."""
    if (found := player.look_up(question)) is not None:
        if found.tokens:
            raise DemoError(f"a look-up found {found.tokens} tokens while the manager was dead")
        step.note(f"a look-up without a manager is a miss within {found.seconds * 1000:.1f} ms")


def _hit_again(player: Player, question: str, tokens: int, step: Step) -> None:
    """Wait until an engine that went on finds again what was stored. Raises `DemoError` after `BACK` seconds."""

    def found() -> bool:
        now = player.look_up(question)
        return now is not None and now.tokens >= tokens

    seconds = poll(found, BACK, "the hit did not come back")
    step.note(f"hit back after {seconds:.1f} s")
