"""The cast without vLLM: two worker processes with the demo's own engine on torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ..worker import Worker
from .cast import Found, Run
from .chat_model import ChatModel
from .hardware import Hardware
from .processes import child_environment
from .torch_engine import TorchEngine

BLOCK_SIZES = (16, 32)
"""Tokens in a block of A's and B's paged cache: engines that differ in it share chunks all the same."""
SILENCE = 300.0
"""Seconds after which a worker that says nothing counts as hung. Loading the model, or one prefill step, is its longest work
without a word."""


class TorchPlayer:
    """One of the two. Not thread-safe: one question at a time."""

    def __init__(self, worker: Worker, moved: Callable[[int, int], None]) -> None:
        self._worker, self._moved = worker, moved

    @property
    def pid(self) -> int:
        return self._worker.pid

    def wait_ready(self) -> None:
        self._worker.ready()

    def count(self, text: str) -> int:
        return self._worker.call(TorchEngine.count, text)

    def ask(self, prompt: str, *, salt: str = "", max_tokens: int = 24) -> Run:
        asked = self._worker.begin(TorchEngine.ask, prompt, salt, max_tokens)
        return asked.result(on_note=lambda note: self._moved(*note))

    def look_up(self, prompt: str) -> Found:
        return self._worker.call(TorchEngine.look_up, prompt)

    def kill(self) -> None:
        self._worker.kill()


class TorchCast:
    """Workers with the demo's own model. They end with the stack that it was given."""

    engines = "the demo's engines"
    own_cache = False
    measured = (
        "first token: from the prompt's token ids to the first token, look-up and load included. "
        f"Paged caches: blocks of {BLOCK_SIZES[0]} tokens in A, of {BLOCK_SIZES[1]} in B."
    )

    def __init__(
        self,
        stack: ExitStack,
        folder: Path,
        hardware: Hardware,
        served: ChatModel,
        address: str,
        moved: Callable[[int, int], None],
    ) -> None:
        """`moved` hears how many tokens of a prompt are done, of how many."""
        self._stack, self._folder, self._hardware = stack, folder, hardware
        self._served, self._address, self._moved = served, address, moved

    def start(self, number: int) -> TorchPlayer:
        name = f"torch-{'ab'[number]}"
        made_of = {
            "model_dir": self._served.name,
            "revision": self._served.revision,
            "device": f"cuda:{self._hardware.devices[number]}" if self._hardware.on_gpu else "cpu",
            "dtype": self._hardware.dtype,
            "block_size": BLOCK_SIZES[number],
            "address": self._address,
        }
        env = child_environment(os.environ)
        worker = Worker(TorchEngine, made_of, name=name, env=env, log=self._folder / f"{name}.log", timeout=SILENCE)
        self._stack.callback(worker.kill)  # it has nothing to save
        return TorchPlayer(worker, self._moved)
