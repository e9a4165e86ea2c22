"""An engine process of the soak: runs calls in threads of their own, halts them at windows, compares what is read."""

from __future__ import annotations

import faulthandler
import random
import signal
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from soak_checker import Read, compare, poisoned
from soak_mutants import undo
from soak_windows import Aim, Halts, WatchedMover, Window, exit_now, redirect_output
from support.cluster import eventually
from support.paged import Paged, content

import vcache.engine
from vcache import KVCacheSpec, VCacheConfig, VCacheEngine
from vcache.cache.pool import ChunkPool
from vcache.errors import VCacheError

CLOSE_TIMEOUT = 0.5
"""Seconds that `close` waits for a store that is halted."""
LAYOUT, BLOCKS, BLOCK_SIZE = "2BNHD", 24, 8


class Speaker:
    """The worker's end of the pipe, for several threads."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def say(self, kind: str, value: Any) -> None:
        with self._lock:
            self._pipe.send((kind, value))


class SoakWorker:
    """Calls by name. Each runs in its own thread; its aims apply to that thread alone."""

    def __init__(self, config: dict[str, Any], spec: dict[str, Any]) -> None:
        self._config = VCacheConfig.from_env({}, **config)
        self.spec = KVCacheSpec(**spec)
        self._here = threading.local()
        self.open()

    def open(self) -> None:
        """Make an engine, in place of the one before."""
        self.engine = VCacheEngine(self._config, self.spec)
        self._watch(self.engine.pool)

    def run(self, function: str, arguments: Sequence[Any], halts: Halts) -> Any:
        self._here.halts = halts
        return getattr(self, function)(*arguments)

    def store(self, tokens: list[int], seed: int) -> None:
        paged, slots = Paged.zeros(self.spec, LAYOUT, BLOCKS, BLOCK_SIZE), _slots(len(tokens), seed)
        paged.write(slots, content(self.spec, tokens))
        self.engine.store(tokens, kvcaches=self._bind(paged), slot_mapping=torch.tensor(slots))

    def retrieve(self, tokens: list[int], seed: int) -> Read:
        paged, slots = poisoned(self.spec, LAYOUT, BLOCKS, BLOCK_SIZE), _slots(len(tokens), seed)
        mask = self.engine.retrieve(tokens, kvcaches=self._bind(paged), slot_mapping=torch.tensor(slots))
        return compare(paged, tokens, slots, mask.tolist())

    def refill(self, tokens: list[int], seed: int) -> None:
        """Store a prompt that takes the whole pool, until all of it is there: no slot is lost for good. Raises `AssertionError`
        after 25 s."""

        def whole() -> bool:
            self.store(tokens, seed)
            return self.engine.lookup(tokens) == len(tokens)

        eventually(whole, 25.0, what="the whole pool can be written")

    def clear(self) -> None:
        """Empty the pool, if the manager is there."""
        try:
            self.engine.manager.clear()
        except VCacheError:
            return

    def close(self) -> None:
        self.engine.close()

    def ready(self, segments: int) -> None:
        """Block until this engine has a session and knows all segments, which are so many. Raises `AssertionError` after
        25 s."""

        def seen() -> bool:
            try:
                mounted = {segment.info.uuid for segment in self.engine.manager.stats().segments}
            except VCacheError:
                return False
            known = {info.uuid for info in self.engine.cache.segments.segments()}
            return len(mounted) == segments and mounted == known

        eventually(seen, 25.0, what="a session and all segments")

    def _bind(self, paged: Paged) -> Any:
        target = self.engine.bind(paged.tensors)
        return target._replace(mover=WatchedMover(self._here.halts))

    def _watch(self, pool: ChunkPool) -> None:
        """Make windows of the manager's answers."""
        manager: Any = pool.manager
        put_start, put_end, acquire = manager.put_start, manager.put_end, manager.acquire

        def granted(*arguments: Any) -> Any:
            grants = put_start(*arguments)
            self._reach("granted")
            return grants

        def landed(*arguments: Any) -> Any:
            self._reach("landed")
            return put_end(*arguments)

        def leased(*arguments: Any, **more: Any) -> Any:
            lease = acquire(*arguments, **more)
            self._reach("leased")
            return lease

        manager.put_start, manager.put_end, manager.acquire = granted, landed, leased

    def _reach(self, window: Window) -> None:
        halts: Halts | None = getattr(self._here, "halts", None)
        if halts is not None:  # else a thread of the engine's own
            halts.reach(window)


def _slots(count: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(BLOCKS * BLOCK_SIZE), count)


def main(pipe: Connection, config: dict[str, Any], spec: dict[str, Any]) -> None:
    """Serve calls until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    redirect_output(config.pop("log"))
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    vcache.engine.CLOSE_TIMEOUT = CLOSE_TIMEOUT
    undo(config.pop("without"))
    speaker, halted = Speaker(pipe), dict[int, Halts]()
    worker = SoakWorker(config, spec)
    speaker.say("value", "ready")

    def call(number: int, function: str, arguments: Sequence[Any]) -> None:
        try:
            speaker.say("done", (number, worker.run(function, arguments, halted[number])))
        except Exception:  # noqa: BLE001 - the soak reports it
            speaker.say("raised", (number, traceback.format_exc()))

    try:
        while True:
            kind, number, *request = pipe.recv()
            if kind == "go":
                halted[number].go_on()
                continue
            function, arguments, aims = request

            def report(aim: Aim, number: int = number) -> None:
                speaker.say("halted", (number, aim))

            halted[number] = Halts(aims, report)
            threading.Thread(target=call, args=(number, function, arguments), daemon=True).start()
    except EOFError:
        exit_now()
