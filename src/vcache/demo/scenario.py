"""The demo's story, step by step, over real processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from ..config import CacheConfig
from . import document
from .messages import (
    Answer,
    Ask,
    Connect,
    Connected,
    DemoError,
    Load,
    Loaded,
    Prepare,
    Prepared,
    Probe,
    Probed,
    Progress,
    Reply,
    Request,
)
from .processes import Service, WorkerProcess, poll
from .report import Results
from .stage import Stage

BLOCK_SIZES = (16, 32)
"""Tokens in a block of worker 1's and worker 2's paged cache: engines that differ in it share chunks all the same."""

SILENCE = 300.0
"""Seconds after which a worker that says nothing counts as hung. One prefill step is its longest work without a word."""

R = TypeVar("R", bound=Reply)


def play(stage: Stage, folder: Path, *, device: str, tokens: int, cache_dir: Path) -> Results:
    """Run everything; all processes are gone when it returns or raises. Raises `DemoError`."""
    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(f"worker {number}", folder)) for number in (1, 2)]
        with stage.step("look for GPUs and for the converted model") as step:
            prepared = _ask(workers[0], Prepare(device=device, cache_dir=str(cache_dir)), Prepared, step.moved)
        with stage.step("load the model in two processes") as step:
            loaded = _load(workers, prepared, tokens)
            step.note(f"{prepared.dtype} on {' and '.join(dict.fromkeys(prepared.devices))}, {loaded.chapters} chapters")

        address = f"unix://{folder}/manager.sock"
        serve = ["serve", "--address", address]
        with stage.step("start the manager and a lender") as step:
            manager = stack.enter_context(Service("manager", serve, folder))
            manager.wait_ready()
            size = _pool_bytes(loaded.token_bytes, tokens)
            kind = "host" if prepared.devices[0] == "cpu" else "cuda"
            lend = ["lend", "--address", address, "--kind", kind, "--size", f"{size}B"]
            lender = stack.enter_context(Service("lender", lend, folder))
            lender.wait_ready()
            for worker in workers:
                _ask(worker, Connect(address=address), Connected)
            step.note(f"{size / 2**20:.0f} MiB of {'host memory' if kind == 'host' else 'VRAM'} lent")

        first_question, question = document.FIRST_QUESTION.text, document.SECOND_QUESTION.text
        with stage.step("worker 1 reads the document, answers, stores its KV") as step:
            first = _ask(workers[0], Ask(question=first_question, cached=True, store=True), Answer, step.moved)
            step.note(f"{first.stored_bytes / 2**20:.0f} MiB stored in {first.store * 1000:.0f} ms")
        with stage.step("worker 2 answers another question without a cache") as step:
            control = _ask(workers[1], Ask(question=question, cached=False), Answer, step.moved)
        with stage.step("worker 2 answers it again with the KV of worker 1") as step:
            shared = _ask(workers[1], Ask(question=question, cached=True), Answer, step.moved)

        with stage.step("kill -9 the manager and worker 1") as step:
            manager.kill()
            workers[0].kill()
            gone = _ask(workers[1], Probe(question=question), Probed)
            if gone.hit_tokens:
                raise DemoError(f"a look-up found {gone.hit_tokens} tokens while the manager was dead")
            step.note(f"a look-up now is a miss within {gone.seconds * 1000:.1f} ms")
        with stage.step("start a new manager; the lender reports to it") as step:
            manager = stack.enter_context(Service("manager", serve, folder))
            manager.wait_ready()
            seconds = poll(lambda: _hit(workers[1], question) >= shared.hit_tokens, 60.0, "the hit did not come back")
            step.note(f"hit back after {seconds:.1f} s")
        with stage.step("worker 2 answers once more") as step:
            restarted = _ask(workers[1], Ask(question=question, cached=True), Answer, step.moved)
    return Results(first, control, shared, restarted)


def _load(workers: list[WorkerProcess], prepared: Prepared, tokens: int) -> Loaded:
    """Both at once; the model is read from the same file."""
    for worker, device, block_size in zip(workers, prepared.devices, BLOCK_SIZES, strict=True):
        request = Load(
            model_dir=prepared.model_dir,
            revision=prepared.revision,
            device=device,
            dtype=prepared.dtype,
            tokens=tokens,
            block_size=block_size,
        )
        worker.send(request)
    answers = [_expect(worker, Loaded) for worker in workers]
    return answers[0]


def _hit(worker: WorkerProcess, question: str) -> int:
    return _ask(worker, Probe(question=question), Probed).hit_tokens


def _pool_bytes(token_bytes: int, tokens: int) -> int:
    """Payload bytes to lend: the prompt, a partial chunk's full slot, the chat template; in whole 64 MiB, at least 256."""
    chunk = CacheConfig().chunk_size
    chunks = math.ceil(tokens / chunk) + 2
    step = 64 * 2**20
    return max(256 * 2**20, math.ceil(chunks * chunk * token_bytes / step) * step)


def _ask(
    worker: WorkerProcess, request: Request, kind: type[R], on_progress: Callable[[Progress], None] = lambda progress: None
) -> R:
    worker.send(request)
    return _expect(worker, kind, on_progress)


def _expect(worker: WorkerProcess, kind: type[R], on_progress: Callable[[Progress], None] = lambda progress: None) -> R:
    reply = worker.receive(SILENCE, on_progress)
    if not isinstance(reply, kind):
        raise DemoError(f"{worker.name} answered {type(reply).__name__} where {kind.__name__} was due")
    return reply
