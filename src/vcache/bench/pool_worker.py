"""A `VCacheEngine` in a process of its own, told what to do by JSON lines: the other side of measurements and GPU tests.

KV comes from `kv_pattern`, so that every worker knows what every prompt's bytes must be. Prompt `p` has the token ids
`p, 0, 1, 2, ...`: two prompts share no chunk. `PoolWorker` is the parent's side; the process runs `pool_worker_process.py`.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from array import array
from contextlib import suppress
from types import TracebackType
from typing import Any

import msgspec

from ..errors import VCacheError
from ..spec import KVCacheSpec

ANSWER_TIMEOUT = 120.0


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is started with."""

    config: dict[str, dict[str, Any]]
    """Sections of a `VCacheConfig`."""
    spec: KVCacheSpec
    layout: str = "2BNHD"
    blocks: int
    block_size: int = 16
    device: str = "cuda"
    """torch device of the paged cache."""
    pad: int = 0
    """Bytes between two blocks, see `kv_pattern.make_tensors`."""
    name: str = "worker"


def prompt_tokens(prompt: int, tokens: int) -> array[int]:
    """Token ids of a prompt."""
    return array("I", [prompt, *range(tokens - 1)])


class PoolWorker:
    """A context manager: ends the process, by force if it must. Orders are the methods of `pool_worker_process.Worker`."""

    def __init__(self, settings: WorkerSettings, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "vcache.bench.pool_worker_process", msgspec.json.encode(settings).decode()]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="vcache-bench-worker", daemon=True).start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, operation: str, **arguments: Any) -> None:
        """Send an order without waiting for the answer. Raises `VCacheError` when the process is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"operation": operation, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise VCacheError(f"worker {self.pid} is gone") from None

    def answer(self, timeout: float = ANSWER_TIMEOUT) -> dict[str, Any]:
        """The answer to the oldest order. Raises `VCacheError` on its failure, its death or after `timeout` seconds."""
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise VCacheError(f"worker {self.pid} did not answer within {timeout:g} s") from None
        found: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in found:
            raise VCacheError(f"worker {self.pid}: {found['error']}")
        return found

    def ask(self, operation: str, *, timeout: float = ANSWER_TIMEOUT, **arguments: Any) -> dict[str, Any]:
        self.tell(operation, **arguments)
        return self.answer(timeout)

    def reopen(self, settings: WorkerSettings) -> None:
        """Another engine and cache in the same process: cheaper than another process."""
        self.ask("reopen", settings=msgspec.to_builtins(settings))

    def kill(self) -> None:
        """SIGKILL, and wait for it."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End of input ends the worker. Bounded; idempotent."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            with suppress(BrokenPipeError):  # it may be dead already
                self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def __enter__(self) -> PoolWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
