"""Threads of which one runs at a time, from one access to shared memory to the next, in an order that the test chooses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

WORD = 8


class Ended(BaseException):
    """Ends the thread of an agent whose world is over."""


class Agent:
    """Work in a thread of its own that waits before each step."""

    def __init__(self, scheduler: Scheduler, name: str, work: Callable[[], None]) -> None:
        self.name = name
        self.at = "begins"
        """What it does next."""
        self.condition: Callable[[], bool] | None = None
        """It waits for that."""
        self.over = False
        self.error: BaseException | None = None
        self.wake = threading.Semaphore(0)
        self._scheduler = scheduler
        self._work = work
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    @property
    def ready(self) -> bool:
        return not self.over and (self.condition is None or self.condition())

    def _run(self) -> None:
        self._scheduler.local.agent = self
        try:
            self.wake.acquire()
            if not self._scheduler.ended:
                self._work()
        except Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - raised by `step`
            self.error = error
        self.over = True
        self._scheduler.back.release()


class Scheduler:
    def __init__(self) -> None:
        self.local = threading.local()
        self.back = threading.Semaphore(0)
        self.agents: list[Agent] = []
        self.ended = False
        self.trace: list[str] = []

    def spawn(self, name: str, work: Callable[[], None]) -> Agent:
        agent = Agent(self, name, work)
        self.agents.append(agent)
        return agent

    @property
    def agent(self) -> Agent | None:
        """Whose turn it is, asked in its own thread."""
        return getattr(self.local, "agent", None)

    def pause(self, text: str, condition: Callable[[], bool] | None = None) -> None:
        """Called by an agent before a step; returns when it is its turn (and `condition` holds). Elsewhere it does nothing."""
        agent = self.agent
        if agent is None:
            return
        if not self.ended:
            agent.at, agent.condition = text, condition
            self.back.release()
            agent.wake.acquire()
            agent.condition = None
        if self.ended:
            raise Ended

    def step(self, agent: Agent) -> None:
        """Let an agent do its next step. Raises what it raises."""
        self.trace.append(f"{agent.name}: {agent.at}")
        agent.wake.release()
        self.back.acquire()
        if agent.error is not None:
            raise agent.error

    def end(self) -> None:
        """No agent does anything any more."""
        self.ended = True
        for agent in self.agents:
            agent.wake.release()
        for agent in self.agents:
            agent.thread.join()


class SteppedLock:
    """A lock whose holder may be stopped: others wait by taking no turn. The test itself, which is no agent, cannot wait."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._held = False

    def __enter__(self) -> None:
        while self._held:
            assert self._scheduler.agent is not None
            self._scheduler.pause("waits for a lock", lambda: not self._held)
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False


class SteppedMemory:
    """A slab's bytes, as `MappedSlab.buffer`. Headers are read and written word by word; payloads come as they are."""

    def __init__(self, scheduler: Scheduler, name: str, raw: bytearray, payload: int) -> None:
        """`payload`: where payloads begin."""
        self.raw = raw
        self._scheduler = scheduler
        self._name = name
        self._payload = payload

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, part: slice) -> Any:
        start, stop, _ = part.indices(len(self.raw))
        if start >= self._payload:
            return memoryview(self.raw)[start:stop]
        found = b""
        for at in range(start, stop, WORD):
            self._scheduler.pause(f"reads {self._name}+{at}")
            found += self.raw[at : min(stop, at + WORD)]
        return found

    def __setitem__(self, part: slice, data: bytes) -> None:
        start, stop, _ = part.indices(len(self.raw))
        data = bytes(data)
        assert len(data) == stop - start
        for at in range(start, stop, WORD):
            self._scheduler.pause(f"writes {self._name}+{at}")
            piece = data[at - start : at - start + WORD]
            self.raw[at : at + len(piece)] = piece


class SteppedWords:
    """The words of a write gate."""

    def __init__(self, scheduler: Scheduler, name: str, words: memoryview) -> None:
        self._scheduler = scheduler
        self._name = name
        self._words = words

    def __getitem__(self, index: int) -> int:
        self._scheduler.pause(f"reads {self._name}[{index}]")
        return self._words[index]

    def __setitem__(self, index: int | slice, value: Any) -> None:
        self._scheduler.pause(f"writes {self._name}[{index}]")
        self._words[index] = value
