"""A benchmark's worker in a process of its own: asked, and answering, by JSON lines over its standard streams."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import VCacheError
from .processes import clean_environment, stop


class Worker:
    """The asking side of a process that runs `answer`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Ask and wait for the answer. Raises `VCacheError` when the process has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"operation": operation, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise VCacheError(f"bench: the worker ended during {operation!r}; its message is above")
        found: dict[str, Any] = json.loads(answer)
        return found


@contextmanager
def worker_process(module: str, *arguments: str) -> Iterator[Worker]:
    """`python -m MODULE ARGUMENTS` until the block ends, untouched by `VCACHE_*` variables. Enters once it answers `ready`."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    try:
        worker = Worker(process)
        worker("ready")
        yield worker
    finally:
        stop(process)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def answer(worker: Any, operations: Collection[str]) -> None:
    """Call the methods of `worker` that standard input names, until it ends; then close the worker. Raises `ValueError` for a
    name that is not among `operations`."""
    try:
        for line in sys.stdin:
            request: dict[str, Any] = json.loads(line)
            operation = request.pop("operation")
            if operation not in operations:
                raise ValueError(f"unknown operation {operation!r}")
            print(json.dumps(getattr(worker, operation)(**request)), flush=True)
    finally:
        worker.close()
