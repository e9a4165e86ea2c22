"""The processes of a soak, and the calls that run in them. One thread decides everything; it waits for messages, never for a
clock, but for the bound after which a call counts as hung."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import soak_lender
import soak_worker
from soak_checker import Read, whose
from soak_mutants import Part
from soak_tally import Tally
from soak_windows import Aim, stopped
from support.cluster import START_TIMEOUT, Command, eventually
from support.paged import spec_for

CHUNK = 16
"""Tokens."""
HANG = 30.0
"""Seconds that a call may run, halts left out."""
LOG_TAIL = 8000
"""Characters."""
MOUNTS_WITHIN = 10.0
"""Seconds that an armed lender is given to come to its window."""
SPEC = spec_for("2BNHD", head_size=16)
CHUNK_BYTES = SPEC.payload_bytes(CHUNK)
MANAGER = {"session_timeout": 2.0, "heartbeat_interval": 0.2, "ticket_ttl": 1.0, "quarantine": 0.3}


class Actor:
    """A worker or a lender. Messages are Python objects, since several actors are waited for at a time."""

    def __init__(self, name: str, config: dict[str, Any], main: Callable[..., None]) -> None:
        """Returns before the process is ready."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=main, args=(theirs, config, msgspec.to_builtins(SPEC)), daemon=True)
        self.process.start()
        theirs.close()
        self.name = name
        self.frozen = False
        """Stopped, by itself or by us."""
        self.closed = False
        """Its engine is."""
        self.chunks = 0
        """That a lender has room for."""
        self.calls: list[Call] = []
        """Not over."""

    def wait_ready(self) -> None:
        assert self.pipe.poll(START_TIMEOUT), f"{self.name} does not start"
        assert self.pipe.recv() == ("value", "ready")

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process.is_alive():
            self.signal(signal.SIGCONT)
            self.process.kill()
        self.process.join(10)
        self.pipe.close()

    @property
    def idle(self) -> bool:
        return not (self.calls or self.frozen or self.closed)


class Call:
    """One call of an actor."""

    def __init__(self, number: int, actor: Actor, function: str) -> None:
        self.number = number
        self.actor = actor
        self.function = function
        self.aim: Aim | None = None
        """Where it is halted."""
        self.over = False
        self.value: Any = None
        self.since = time.monotonic()
        """It runs."""

    @property
    def running(self) -> bool:
        return not self.over and self.aim is None and not self.actor.frozen


class World:
    """A context manager; leaves no process and no file behind."""

    def __init__(self, rng: random.Random, tally: Tally, *, workers: int = 4, without: Part = "") -> None:
        """`without`: what workers undo."""
        self.rng = rng
        self.tally = tally
        self.log: list[str] = []
        """What happened in this round."""
        self.prompts: dict[str, list[int]] = {}
        """Of this round, by name."""
        # Not below the temporary folder of a test: a unix socket's path must stay short.
        self._folder = Path(tempfile.mkdtemp(prefix="vc-soak-"))
        self._without = without
        self._numbers = itertools.count()
        self._names = itertools.count(1)
        self._count = workers
        self._manager: Command | None = None
        self.workers: list[Actor] = []
        self.lenders: list[Actor] = []
        self.manager_frozen = False

    def __enter__(self) -> World:
        try:
            for _ in range(2):
                self._add_lender()
            for _ in range(self._count):
                self._add_worker()
            self.start_manager()
            for actor in (*self.lenders, *self.workers):
                actor.wait_ready()
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for actor in (*self.workers, *self.lenders):
            actor.kill()
        if self._manager is not None:
            self._manager.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def say(self, text: str) -> None:
        self.log.append(text)

    @property
    def capacity(self) -> int:
        """Chunks that the pool holds."""
        return sum(lender.chunks for lender in self.lenders)

    # -- processes -------------------------------------------------------------------------------------------------

    @property
    def _env(self) -> dict[str, str]:
        settings = {**MANAGER, "address": f"unix://{self._folder}/manager.sock"}
        return {f"VCACHE_MANAGER_{key.upper()}": str(value) for key, value in settings.items()} | {
            "VCACHE_SEGMENT_BROKER_DIR": str(self._folder)
        }

    def start_manager(self) -> None:
        # Should this process be killed, the manager ends by itself.
        self._manager = Command(self._folder, "serve", "--idle-exit", "60", env=self._env)
        self._manager.wait_for("ready")
        self.say("manager started")

    def kill_manager(self) -> None:
        assert self._manager is not None
        for window in self.halted_windows() or ["none"]:
            self.tally.windows[window, "manager killed"] += 1
        self._manager.kill()
        self.manager_frozen = False
        self.say("manager killed")

    def freeze_manager(self, frozen: bool) -> None:
        assert self._manager is not None
        self._manager.signal(signal.SIGSTOP if frozen else signal.SIGCONT)
        self.manager_frozen = frozen
        self.say(f"manager {'stopped' if frozen else 'goes on'}")

    def restart_manager(self) -> None:
        self.kill_manager()
        self.start_manager()

    def _add_lender(self) -> Actor:
        chunks = self.rng.randint(2, 5)
        slab = self.rng.randint(2, 3) * CHUNK_BYTES
        number = next(self._names)
        config = {
            "arguments": ["lend", "--kind", "host", "--size", str(chunks * CHUNK_BYTES), "--slab-size", str(slab)],
            "env": self._env,
            "log": str(self._log_path(f"lender {number}")),
        }
        lender = Actor(f"lender {number}", config, soak_lender.main)
        lender.chunks = chunks
        self.lenders.append(lender)
        return lender

    def _add_worker(self) -> Actor:
        number = next(self._names)
        config: dict[str, Any] = {
            "manager": {**MANAGER, "address": self._env["VCACHE_MANAGER_ADDRESS"]},
            "segment": {"lend": False, "kind": "host", "broker_dir": str(self._folder)},
            "cache": {"chunk_size": CHUNK},
            "log": str(self._log_path(f"worker {number}")),
            "without": self._without,
        }
        self.workers.append(Actor(f"worker {number}", config, soak_worker.main))
        return self.workers[-1]

    def kill(self, actor: Actor) -> None:
        """End it for good; calls in it are over."""
        column = "writer killed" if actor in self.workers else "lender killed"
        for window in self.halted_windows(actor) or ["none"]:
            self.tally.windows[window, column] += 1
        self._bury(actor)
        self.say(f"{actor.name} killed")

    def _bury(self, actor: Actor) -> None:
        actor.kill()
        for call in actor.calls:
            call.over, call.aim = True, None
        actor.calls.clear()
        (self.workers if actor in self.workers else self.lenders).remove(actor)

    def replenish(self) -> None:
        """Start what is missing, thaw what is stopped, open what is closed."""
        if self.manager_frozen:
            self.freeze_manager(False)
        for actor in (*self.workers, *self.lenders):
            if actor.frozen:
                self.thaw(actor)
        new = [self._add_worker() for _ in range(self._count - len(self.workers))]
        self.replenish_lenders()
        for actor in new:
            actor.wait_ready()
        for actor in [actor for actor in self.workers if actor.closed and not actor.calls]:
            actor.closed = False
            self.finish(self.begin(actor, "open"))

    def replenish_lenders(self) -> None:
        """Start lenders in place of those that are gone."""
        for actor in [self._add_lender() for _ in range(2 - len(self.lenders))]:
            actor.wait_ready()

    def begin_round(self, rng: random.Random) -> None:
        """All choices come from `rng` from now on."""
        self.rng = rng
        self.log, self.prompts = [], {}

    def end_round(self) -> None:
        """Whatever happened, everything is there again and idle."""
        self.replenish()
        self.finish_all()
        self.replenish()
        self.wait_ready()
        tokens = self.prompts[self.prompt("all", CHUNK * self.capacity)]
        self.finish(self.begin(self.rng.choice(self.free()), "refill", tokens, self.rng.getrandbits(32)))
        self.check(["all"])

    def freeze(self, actor: Actor) -> None:
        actor.signal(signal.SIGSTOP)
        actor.frozen = True
        self.say(f"{actor.name} stopped")

    def thaw(self, actor: Actor) -> None:
        assert actor.process.pid is not None
        actor.frozen = False
        for call in actor.calls:
            call.since = time.monotonic()
            if call.aim is not None and call.aim.stop:
                call.aim = None
        actor.signal(signal.SIGCONT)

    def halted_windows(self, actor: Actor | None = None) -> list[str]:
        """Of that actor, or of all."""
        return [call.aim.window for call in self.calls() if call.aim is not None and actor in (None, call.actor)]

    # -- calls -----------------------------------------------------------------------------------------------------

    def calls(self) -> list[Call]:
        """Those that are not over."""
        return [call for actor in (*self.workers, *self.lenders) for call in actor.calls]

    def halted(self) -> list[Call]:
        return [call for call in self.calls() if call.aim is not None]

    def begin(self, actor: Actor, function: str, *arguments: Any, aims: Sequence[Aim] = ()) -> Call:
        call = Call(next(self._numbers), actor, function)
        actor.calls.append(call)
        self.tally.calls[function] += 1
        actor.pipe.send(("call", call.number, function, arguments, list(aims)))
        return call

    def store(self, actor: Actor, name: str, aims: Sequence[Aim] = ()) -> Call:
        self.say(f"{actor.name}: store {name} ({len(self.prompts[name])} tokens)")
        return self.begin(actor, "store", self.prompts[name], self.rng.getrandbits(32), aims=aims)

    def retrieve(self, actor: Actor, name: str, aims: Sequence[Aim] = ()) -> Call:
        return self.begin(actor, "retrieve", self.prompts[name], self.rng.getrandbits(32), aims=aims)

    def go_on(self, call: Call) -> None:
        """Let a halted call go on."""
        assert call.aim is not None
        self.say(f"{call.actor.name}: {call.function} goes on from {_where(call.aim)}")
        if call.aim.stop:
            self.thaw(call.actor)
        else:
            call.aim, call.since = None, time.monotonic()
            call.actor.pipe.send(("go", call.number))
        if call.actor in self.lenders:
            self._drop(call)

    def settle(self, *calls: Call) -> None:
        """Wait until none of these runs: each is over, halted, or its process is stopped."""
        while any(call.running for call in calls):
            self.pump()

    def finish(self, call: Call) -> Any:
        """Let a call run to its end; what it returned."""
        self.settle(call)
        while not call.over:
            if call.aim is not None:
                self.go_on(call)
            elif call.actor.frozen:
                self.thaw(call.actor)
            self.settle(call)
        return call.value

    def finish_all(self) -> None:
        """Also disarms lenders."""
        for call in self.calls():
            if call.actor in self.workers:
                self.finish(call)
            elif call.aim is not None:
                self.go_on(call)
            else:
                self.disarm(call)

    def arm(self, lender: Actor, aim: Aim) -> Call:
        """Let a mount of that lender halt, the next one that comes there."""
        return self.begin(lender, "mount", aims=[aim])

    def await_mount(self, call: Call) -> bool:
        """Wait until an armed lender halts; False, and it is disarmed, when it does not come there."""
        deadline = time.monotonic() + MOUNTS_WITHIN
        while call.running and time.monotonic() < deadline:
            self.pump()
        if call.aim is None and not call.over:
            self.disarm(call)
        return call.aim is not None

    def disarm(self, call: Call) -> None:
        call.actor.pipe.send(("call", call.number, call.function, (), []))
        self._drop(call)

    def _drop(self, call: Call) -> None:
        call.over = True
        call.actor.calls.remove(call)

    def pump(self) -> None:
        """Take in what actors say; waits for a message if there is none."""
        pipes = {actor.pipe: actor for actor in (*self.workers, *self.lenders) if not actor.frozen or actor.pipe.poll()}
        for pipe in wait(list(pipes), 1.0):
            self._hear(pipes[pipe])
        now = time.monotonic()
        for call in self.calls():
            if call.actor in self.workers and call.running and now - call.since > HANG and not call.actor.pipe.poll():
                self._hung(call)

    def _hear(self, actor: Actor) -> None:
        try:
            kind, (number, value) = actor.pipe.recv()
        except (EOFError, OSError):
            self.tally.deaths += 1
            self.say(f"{actor.name} ENDED BY ITSELF\n{self._log_of(actor)}")
            self._bury(actor)
            return
        call = next((call for call in actor.calls if call.number == number), None)
        if call is None:
            self._overtaken(actor, number, value)
            return
        if actor in self.workers:
            self.tally.ended(call.function, time.monotonic() - call.since)
        if kind == "halted":
            call.aim = value
            self.tally.windows[value.window, "reached"] += 1
            if value.stop:
                self._await_stop(actor)
                actor.frozen = True
            self.say(f"{actor.name}: {call.function} {'stopped' if value.stop else 'held'} at {_where(value)}")
            return
        call.over, call.value = True, value
        actor.calls.remove(call)
        if kind == "raised":
            self.tally.exceptions += 1
            self.say(f"{actor.name}: {call.function} RAISED\n{value}")

    def _overtaken(self, actor: Actor, number: int, aim: Aim) -> None:
        """A lender had come to its window before it heard that it need not halt there."""
        if aim.stop:
            self._await_stop(actor)
            actor.signal(signal.SIGCONT)
        else:
            actor.pipe.send(("go", number))

    def _await_stop(self, actor: Actor) -> None:
        pid = actor.process.pid or 0
        eventually(lambda: stopped(pid), what="a process that stopped itself")

    def _hung(self, call: Call) -> None:
        self.tally.hangs += 1
        call.actor.signal(signal.SIGUSR1)
        eventually(lambda: "(most recent call first)" in self._log_of(call.actor), what="the stacks of its threads")
        self.say(f"{call.actor.name}: {call.function} HANGS\n{self._log_of(call.actor)}")
        self._bury(call.actor)

    def _log_of(self, actor: Actor) -> str:
        """The end of what it printed."""
        return self._log_path(actor.name).read_text()[-LOG_TAIL:]

    def _log_path(self, name: str) -> Path:
        return self._folder / f"{name.replace(' ', '-')}.log"

    # -- what holds at the end ---------------------------------------------------------------------------------------

    def free(self) -> list[Actor]:
        """Workers that can be asked something."""
        return [actor for actor in self.workers if actor.idle]

    def wait_ready(self) -> None:
        """Until the free workers have a session and know all segments."""
        lenders = sum(not actor.frozen for actor in self.lenders)
        for call in [self.begin(actor, "ready", lenders) for actor in self.free()]:
            self.finish(call)

    def check(self, names: Iterable[str] | None = None) -> None:
        """All free workers read prompts of this round."""
        for name in list(names or self.prompts):
            for call in [self.retrieve(actor, name) for actor in self.free()]:
                self.finish(call)
                if isinstance(call.value, Read):
                    self.judge(name, call.actor, call.value)

    def judge(self, name: str, actor: Actor, read: Read) -> None:
        self.tally.read(read)
        if read.wrong:
            self.say(
                f"{actor.name}: retrieve {name}: {read.delivered} tokens marked True, {len(read.wrong)} of them WRONG: "
                f"{whose(SPEC, read, self.prompts)}"
            )
        if read.strays:
            self.say(f"{actor.name}: retrieve {name}: {read.strays} STRAY rows or marks")

    def prompt(self, name: str, tokens: int, like: str = "") -> str:
        """Make a prompt that no other round knows; `like`: it shares the first chunk of that one. Its name."""
        shared = self.prompts[like][:CHUNK] if like else []
        self.prompts[name] = [*shared, *(self.rng.getrandbits(31) for _ in range(tokens - len(shared)))]
        return name


def _where(aim: Aim) -> str:
    place = f" of chunk {aim.chunk}" if aim.window in ("header", "payload", "loading", "loaded") else ""
    return f"{aim.window!r}{f' store {aim.step}' if aim.step else ''}{place}"
