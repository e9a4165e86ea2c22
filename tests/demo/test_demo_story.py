"""The story, with engines that have a prefix cache of their own (vLLM) and with ones that do not: every step, every end."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from vcache.demo import DemoError, story
from vcache.demo.cast import Found, Run
from vcache.demo.report import problems
from vcache.demo.stage import Stage
from vcache.demo.story import Results, play

COLD = Run(5800, 0, 0, 0, 0, 0.0, 10.0, "periwinkle", [1, 2, 3], [])


class World:
    """Engines and pool in one: who has what, and what goes wrong."""

    lent = "all of it"

    def __init__(self, *, own_cache: bool = True) -> None:
        self.own_cache = own_cache
        self.managed = True
        self.haunted = False
        self.stored: set[str] = set()
        self.events: list[str] = []
        self.off = ""
        self.forgets = False
        self.salts: list[str] = []

    def start(self) -> None:
        self.events.append("pool")

    def start_manager(self) -> None:
        self.events.append("manager")
        self.managed = True

    def kill_manager(self) -> None:
        self.events.append("kill manager")
        self.managed = False
        if self.forgets:
            self.stored.clear()

    def wait_for_chunks(self, wanted: int) -> None:
        if len(self.stored) * 3 < wanted:
            raise DemoError("only 0 chunks are in the pool: VCache did not do its work")


class Engines:
    """The cast of a world."""

    engines, measured = "fakes", "Not at all."

    def __init__(self, world: World) -> None:
        self.world, self.own_cache = world, world.own_cache

    def start(self, number: int) -> Engine:
        return Engine(self.world, number)


class Engine:
    """One of the world. Prompts are their document, their question and a salt."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.name, self.pid = world, "ab"[number], 100 + len(world.events)
        self.own: set[str] = set()
        world.events.append(f"start {self.name}")

    def wait_ready(self) -> None:
        self.world.events.append(f"{self.name} ready")

    def count(self, text: str) -> int:
        return len(text.split())

    def kill(self) -> None:
        self.world.events.append(f"kill {self.name}")

    def ask(self, prompt: str, *, salt: str = "", max_tokens: int = 24) -> Run:
        book, _, question = prompt.partition("Question: ")
        key, tokens = salt + book, len(prompt.split())
        if not question:
            self.world.salts.append(salt)
            return COLD._replace(prompt_tokens=tokens)
        run = COLD._replace(prompt_tokens=tokens, text=question, prompt_ids=[hash(word) for word in prompt.split()])
        whole = tokens // 256 * 256
        if key in self.own:
            run = run._replace(own_tokens=whole)
        elif key in self.world.stored and self.world.off != self.name:
            run = run._replace(hit_tokens=whole, loaded_tokens=whole)
        elif self.world.off != self.name:
            self.world.stored.add(key)
        if self.world.own_cache:
            self.own.add(key)
        return run

    def look_up(self, prompt: str) -> Found | None:
        if self.world.own_cache:
            return None
        stored = prompt.partition("Question: ")[0] in self.world.stored
        there = stored and (self.world.managed or self.world.haunted)
        return Found(len(prompt.split()) // 256 * 256 if there else 0, 0.002)


def told(world: World) -> tuple[Results, str]:
    output = io.StringIO()
    results = play(Stage(Console(file=output, width=100)), world, Engines(world), 1000)
    return results, output.getvalue()


def test_a_good_story_has_no_problem() -> None:
    world = World()
    results, output = told(world)
    assert problems(results) == []
    assert results.first.text != results.control.text == results.restarted.text
    assert world.events == [
        *("pool", "start a", "start b", "a ready", "b ready"),
        *("kill a", "kill manager", "manager", "start a", "a ready"),
    ]
    assert len(re.findall("^done ", output, re.MULTILINE)) == 10
    # What warms up leaves nothing behind that a question could find.
    assert world.salts == ["warm-up"] * 3


def test_a_connector_that_is_off_in_b_fails_the_demo() -> None:
    world = World()
    world.off = "b"
    found = problems(told(world)[0])
    assert any(line.startswith("B through VCache: proves nothing") or "only 0 of" in line for line in found)
    assert {line.split(":")[0] for line in found} == {"B through VCache"}


def test_a_connector_that_is_off_in_a_stops_the_demo() -> None:
    world = World()
    world.off = "a"
    with pytest.raises(DemoError, match="VCache did not do its work"):
        told(world)


def test_a_pool_that_forgets_stops_the_demo() -> None:
    world = World()
    world.forgets = True
    with pytest.raises(DemoError, match="VCache did not do its work"):
        told(world)


def test_engines_without_a_cache_of_their_own_tell_it_too() -> None:
    world = World(own_cache=False)
    results, output = told(world)
    assert problems(results) == []
    assert (results.own, results.last) == (None, "B")
    assert world.events == ["pool", "start a", "start b", "a ready", "b ready", "kill a", "kill manager", "manager"]
    assert len(re.findall("^done ", output, re.MULTILINE)) == 9
    assert re.search(r"a look-up without a manager is a miss within 2\.0 ms", output)
    assert re.search(r"hit back after \d", output)


def test_a_hit_without_a_manager_stops_the_demo() -> None:
    world = World(own_cache=False)
    world.haunted = True
    with pytest.raises(DemoError, match="a look-up found 768 tokens while the manager was dead"):
        told(world)


def test_a_hit_that_does_not_come_back_stops_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "BACK", 0.1)
    world = World(own_cache=False)
    world.forgets = True
    with pytest.raises(DemoError, match="the hit did not come back: not within 0 s"):
        told(world)
