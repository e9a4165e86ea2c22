"""One worker process of the demo: a language model over a paged KV cache, and a `VCacheEngine`.

Started as `python -m vcache.demo.worker`; speaks `messages` over stdin and stdout and ends when stdin does. What libraries
print goes to stderr.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec
import torch

from ..config import CacheConfig, ManagerConfig, SegmentConfig, VCacheConfig
from ..errors import VCacheError
from ..logs import configure_logging
from . import document, model
from .messages import (
    Answer,
    Ask,
    Connect,
    Connected,
    DemoError,
    Failed,
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
from .pager import PagedMemory
from .runner import Generation, generate

if TYPE_CHECKING:
    from ..engine import VCacheEngine

logger = logging.getLogger("vcache.demo")

STEP = CacheConfig().chunk_size
"""Tokens in a prefill step: one chunk, so that every prefill is cut alike wherever it starts."""


class Worker:
    """Carries out requests one after the other. `send` delivers progress."""

    def __init__(self, send: Callable[[Reply], None]) -> None:
        self._send = send
        self._model: model.Model | None = None
        self._engine: VCacheEngine | None = None
        self._document = ""
        self._device = "cpu"
        self._block_size = 16
        self._asked = 0

    def handle(self, request: Request) -> Reply:
        """Blocks until done. Raises `VCacheError` for what cannot be done."""
        match request:
            case Prepare():
                return self._prepare(request)
            case Load():
                return self._load(request)
            case Connect():
                return self._connect(request)
            case Ask():
                return self._ask(request)
            case Probe():
                began = time.perf_counter()
                hit = self._connected().lookup(self._prompt(request.question))
                return Probed(hit_tokens=hit, seconds=time.perf_counter() - began)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _prepare(self, request: Prepare) -> Prepared:
        gpus = torch.cuda.device_count() if request.device != "cpu" and torch.cuda.is_available() else 0
        if request.device == "cuda" and not gpus:
            raise DemoError("--device cuda: torch finds no usable GPU; see `vcache doctor`, or use --device cpu")
        devices = ["cuda:0", f"cuda:{gpus - 1}"] if gpus else ["cpu", "cpu"]
        converting = Progress(what="converting the model, once", done=0, total=1)
        folder, revision = model.prepare(
            Path(request.cache_dir), model.gguf_file(), model.convert_gguf, lambda: self._send(converting)
        )
        return Prepared(model_dir=str(folder), revision=revision, devices=devices, dtype=model.choose_dtype(devices[0]))

    def _load(self, request: Load) -> Loaded:
        self._model = model.load(request.model_dir, request.revision, request.device, request.dtype)
        self._device, self._block_size = request.device, request.block_size
        tokenizer = self._model.tokenizer
        book = document.build(request.tokens, lambda text: len(tokenizer(text)["input_ids"]))
        self._document = book.text
        warm_up = self._prompt("")[: 2 * STEP]
        self._generate(warm_up, self._memory(len(warm_up) + 2), 0, 2)
        return Loaded(chapters=book.chapters, token_bytes=self._model.spec.token_bytes)

    def _connect(self, request: Connect) -> Connected:
        from ..engine import VCacheEngine

        # The KV must outlive this process, so it lends nothing itself: all of it lies in the lender's memory.
        config = VCacheConfig(manager=ManagerConfig(address=request.address), segment=SegmentConfig(lend=False))
        self._engine = VCacheEngine(config, self._loaded().spec, device=self._device, name=f"demo-worker-{os.getpid()}")
        return Connected()

    def _ask(self, request: Ask) -> Answer:
        prompt = self._prompt(request.question)
        memory = self._memory(len(prompt) + request.max_tokens)
        caches: dict[str, Any] = {"kvcaches": memory.tensors, "slot_mapping": memory.slot_mapping[: len(prompt)]}
        began = looked_up = retrieved = time.perf_counter()
        hit = loaded = 0
        if request.cached:
            engine = self._connected()
            hit = engine.lookup(prompt)
            looked_up = time.perf_counter()
            loaded = int(engine.retrieve(prompt, **caches).sum())
            retrieved = time.perf_counter()
        # The last token must be computed in any case: its logits are the answer's first token.
        used = min(loaded, len(prompt) - 1) // STEP * STEP
        made = self._generate(prompt, memory, used, request.max_tokens)
        began_store = time.perf_counter()
        if request.store:
            self._connected().store(prompt, **caches)
            self._connected().flush()
        stored = time.perf_counter() - began_store
        token_bytes = self._loaded().spec.token_bytes
        return Answer(
            prompt_tokens=len(prompt),
            hit_tokens=hit,
            used_tokens=used,
            ids=made.ids,
            text=self._loaded().tokenizer.decode(made.ids),
            first_token=made.first_token - began,
            logits_digest=made.logits_digest,
            lookup=looked_up - began,
            retrieve=retrieved - looked_up,
            retrieved_bytes=loaded * token_bytes,
            store=stored,
            stored_bytes=len(prompt) * token_bytes if request.store else 0,
        )

    def _generate(self, prompt: list[int], memory: PagedMemory, present: int, max_tokens: int) -> Generation:
        loaded = self._loaded()
        total = len(prompt)
        return generate(
            loaded.network,
            prompt,
            memory,
            present=present,
            step=STEP,
            max_tokens=max_tokens,
            end_token=loaded.tokenizer.eos_token_id,
            on_step=lambda done: self._send(Progress(what="computing the prompt's KV", done=done, total=total)),
        )

    def _prompt(self, question: str) -> list[int]:
        """Token ids of the document followed by the question, as the model's chat template wants them."""
        tokenizer = self._loaded().tokenizer
        message = {"role": "user", "content": f"{self._document}\n\nQuestion: {question}"}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids

    def _memory(self, capacity: int) -> PagedMemory:
        """Fresh paged memory, its blocks shuffled differently each time and in each process."""
        self._asked += 1
        seed = os.getpid() * 1000 + self._asked
        return PagedMemory(self._loaded().spec, capacity, self._block_size, device=self._device, seed=seed)

    def _loaded(self) -> model.Model:
        if self._model is None:
            raise DemoError("the worker got a question before its model")
        return self._model

    def _connected(self) -> VCacheEngine:
        if self._engine is None:
            raise DemoError("the worker got a cached question before a manager")
        return self._engine


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer requests, a JSON line each, until the end of `requests`."""

    def send(reply: Reply) -> None:
        replies.write(msgspec.json.encode(reply) + b"\n")
        replies.flush()

    worker = Worker(send)
    try:
        for line in requests:
            try:
                send(worker.handle(msgspec.json.decode(line, type=Request)))
            except VCacheError as error:
                send(Failed(error=str(error)))
    finally:
        worker.close()


def main() -> None:
    configure_logging()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
