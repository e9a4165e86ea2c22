"""The story with two vLLM instances, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from . import document
from .stage import Stage
from .vllm_instance import Run
from .vllm_pool import whole_chunks

SALT = "without VCache"
"""The salt of the run that must find nothing: nothing else is stored under it."""
WARM_UP = "warm-up"
"""The salt of the questions that warm up: else the chat template, with which all prompts begin, would be cached."""


class Server(Protocol):
    """What the story needs of an `Instance`."""

    name: str

    @property
    def pid(self) -> int: ...
    def wait_ready(self) -> None: ...
    def version(self) -> str: ...
    def count(self, text: str) -> int: ...
    def ask(self, prompt: str, *, salt: str = "", max_tokens: int = 24) -> Run: ...
    def kill(self) -> None: ...


class SharedPool(Protocol):
    """What the story needs of a `Pool`."""

    def start(self) -> None: ...
    def start_manager(self) -> None: ...
    def kill_manager(self) -> None: ...
    def wait_for_chunks(self, wanted: int) -> float: ...


class Results(NamedTuple):
    """One answer for every run, in the order of the story."""

    first: Run
    """Instance A, first question, nothing stored yet."""
    control: Run
    """Instance B, second question, under a salt: nothing of it is cached anywhere."""
    shared: Run
    """Instance B, second question, with what A stored."""
    own: Run
    """The same once more: now B has it in its own prefix cache."""
    restarted: Run
    """Instance A, started anew after it and the manager were killed; second question."""


def prompt(book: str, question: document.Question) -> str:
    return f"{book}\n\nQuestion: {question.text}"


def play(stage: Stage, pool: SharedPool, start: Callable[[int], Server], tokens: int) -> Results:
    """Run everything. `start(number)` starts instance 0 or 1, which whoever gave it ends. Raises `DemoError`.

    Instances start at the same time; while one is measured the other is idle.
    """
    with stage.step("start a manager and a lender"):
        pool.start()
    with stage.step("start vLLM instances A and B") as step:
        a, b = start(0), start(1)
        for instance in (a, b):
            instance.wait_ready()
        step.note(f"vLLM {a.version()}, processes {a.pid} and {b.pid}")
    with stage.step("both answer something short, to warm up"):
        book = document.build(tokens, a.count).text
        warm = [_warm_up(instance) for instance in (a, b)]
    question = prompt(book, document.SECOND_QUESTION)
    with stage.step("A reads the document and answers; its KV goes to the pool") as step:
        first = a.ask(prompt(book, document.FIRST_QUESTION))
        # Of a long template, the warm-up stored chunks too.
        chunks = whole_chunks(first.prompt_tokens) + whole_chunks(warm[0].prompt_tokens)
        pool.wait_for_chunks(chunks)
        step.note(f"{chunks} chunks are in the pool")
    with stage.step("B answers another question without VCache"):
        control = b.ask(question, salt=SALT)
    with stage.step("B answers it with the KV that A computed"):
        shared = b.ask(question)
    with stage.step("B answers it once more, from its own prefix cache"):
        own = b.ask(question)
    with stage.step("kill -9 instance A and the manager, start both anew") as step:
        killed = a.pid
        a.kill()
        pool.kill_manager()
        pool.start_manager()
        a = start(0)
        a.wait_ready()
        pool.wait_for_chunks(chunks)
        _warm_up(a)
        step.note(f"process {a.pid} instead of {killed}")
    with stage.step("A answers B's question, with the KV of its former life"):
        restarted = a.ask(question)
    return Results(first, control, shared, own, restarted)


def _warm_up(instance: Server) -> Run:
    return instance.ask("What is the capital of France?", salt=WARM_UP, max_tokens=4)
