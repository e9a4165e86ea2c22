"""The process of a `PoolWorker`: one method for each order, arguments and results of JSON types."""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec
import torch

from ..config import VCacheConfig
from ..engine import VCacheEngine
from ..errors import VCacheError
from ..keys import Chunk, TokenDatabase
from ..paged.mover import SlotTransfer
from . import kv_pattern
from .mover_runs import device_seconds
from .paged_data import block_mapping, random_mapping
from .pool_worker import WorkerSettings, prompt_tokens

_OTHER = 1_000_000
"""Added to a prompt's number: what rows hold before something is retrieved into them."""


class Worker:
    """An engine, a paged cache, and what can be done with them."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._open(settings)

    def _open(self, settings: WorkerSettings) -> None:
        self.spec, self.layout = settings.spec, settings.layout
        self.device = torch.device(settings.device)
        self.slots = settings.blocks * settings.block_size
        self.block_size = settings.block_size
        self.tensors = kv_pattern.make_tensors(
            self.spec, self.layout, settings.blocks, settings.block_size, self.device, pad=settings.pad
        )
        config = VCacheConfig.from_env(env={}, **settings.config)
        self.chunk_size = config.cache.chunk_size
        self.engine = VCacheEngine(config, self.spec, device=settings.device, name=settings.name)

    def ready(self) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def reopen(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Close engine and cache, and begin anew with other `WorkerSettings`."""
        self.engine.close()
        self.tensors = []
        self._open(msgspec.convert(settings, WorkerSettings))
        return {}

    def store(self, prompt: int, tokens: int, mapping: str = "blocks", seed: int = 0) -> dict[str, Any]:
        """Put the prompt's KV into the cache, and store it. `seconds`: of the store alone."""
        slots = self._mapping(tokens, mapping, seed)
        kv_pattern.write(self.tensors, self.layout, self.spec, slots, prompt)
        self._settle()
        start = time.perf_counter()
        self.engine.store(prompt_tokens(prompt, tokens), kvcaches=self.tensors, slot_mapping=slots)
        return {"seconds": time.perf_counter() - start}

    def retrieve(
        self, prompt: int, tokens: int, mapping: str = "blocks", seed: int = 0, skip: int = 0, content: int = -1
    ) -> dict[str, Any]:
        """Retrieve into rows that held something else. `loaded`: tokens reported; `wrong`: of these, how many hold other bytes
        than the prompt's (or those of prompt `content`)."""
        content = prompt if content < 0 else content
        slots = self._mapping(tokens, mapping, seed)
        kv_pattern.write(self.tensors, self.layout, self.spec, slots, content + _OTHER)
        self._settle()
        mask = [i >= skip for i in range(tokens)] if skip else None
        start = time.perf_counter()
        flags = self.engine.retrieve(prompt_tokens(prompt, tokens), mask, kvcaches=self.tensors, slot_mapping=slots)
        seconds = time.perf_counter() - start
        good = kv_pattern.matches(self.tensors, self.layout, self.spec, slots, content)
        return {"seconds": seconds, "loaded": int(flags.sum()), "wrong": int((flags & ~good).sum())}

    def retrieve_beside(self, prompt: int, tokens: int, mapping: str, seed: int, skip: int = 0) -> dict[str, Any]:
        """`retrieve`, and: `touched`, whether any byte changed in rows outside of the mapping; `skipped_intact`, whether the
        first `skip` tokens' rows were left alone. Copies the cache."""
        before = [tensor.clone() for tensor in self.tensors]
        found = self.retrieve(prompt, tokens, mapping, seed, skip)
        slots = self._mapping(tokens, mapping, seed)
        intact = kv_pattern.matches(self.tensors, self.layout, self.spec, slots[:skip], prompt + _OTHER)
        found["skipped_intact"] = bool(intact.all())
        for tensors in (before, self.tensors):
            kv_pattern.write(tensors, self.layout, self.spec, slots, prompt)
        found["touched"] = not all(same_bytes(one, other) for one, other in zip(before, self.tensors, strict=True))
        return found

    def freeze(self, frozen: bool) -> dict[str, Any]:
        """Take what lives now out of the garbage collector's sight, or back into it."""
        if frozen:
            gc.collect()
            gc.freeze()
        else:
            gc.unfreeze()
        return {"objects": len(gc.get_objects()), "frozen": gc.get_freeze_count()}

    def time_retrieve(
        self, prompt: int, tokens: int, runs: int, mapping: str = "blocks", unnamed: bool = False
    ) -> dict[str, Any]:
        """Seconds of `runs` retrieves of what is there, without a look at the bytes. `unnamed`: as if nothing had been looked
        up or retrieved before, so that the chunks must be named."""
        ids = prompt_tokens(prompt, tokens)
        seconds = []
        mappings = [self._mapping(tokens, mapping, seed) for seed in range(min(runs, 16))]
        for run in range(runs):
            slots = mappings[run % len(mappings)]
            if unnamed:
                self.engine._recent.clear()
            self._settle()
            start = time.perf_counter()
            flags = self.engine.retrieve(ids, kvcaches=self.tensors, slot_mapping=slots)
            seconds.append(time.perf_counter() - start)
            if not bool(flags.all()):
                raise VCacheError(f"only {int(flags.sum())} of {tokens} tokens were loaded")
        return {"seconds": seconds}

    def time_kernels(self, prompt: int, tokens: int, runs: int) -> dict[str, Any]:
        """Seconds that the mover takes on the device for what `time_retrieve` times, from the very same slots."""
        target, pool = self.engine.bind(self.tensors), self.engine.pool
        spans = TokenDatabase(pool.namespace, self.chunk_size).spans(prompt_tokens(prompt, tokens))
        lease = pool.acquire([span.digest for span in spans])
        if lease is None or len(lease.locations) < len(spans):
            raise VCacheError(f"prompt {prompt} is not there")
        slots = [slot for location in lease.locations if (slot := pool.segments.pin(location)) is not None]
        try:
            transfers = [
                SlotTransfer(
                    slot,
                    pool.header(Chunk(span.digest, index, span.end - span.start, span.start), location.generation),
                    span.start,
                )
                for index, (slot, span, location) in enumerate(zip(slots, spans, lease.locations, strict=True))
            ]
            loads = [
                partial(target.mover.load, target.cache, self._mapping(tokens, "blocks", seed), transfers)
                for seed in range(runs)
            ]
            return {"seconds": [device_seconds(load, self.device) for load in loads]}
        finally:
            for slot in slots:
                pool.segments.unpin(slot)
            pool.release(lease.id)

    def pairs(self, first: int, count: int, tokens: int, threads: int) -> dict[str, Any]:
        """`count` prompts from `first` on: each is stored, then it and another one are retrieved and checked; `threads` at a
        time, each in rows of its own. `wrong`: tokens with other bytes than they must have."""
        share = self.slots // threads
        total = {"asked": 0, "loaded": 0, "wrong": 0, "complete": 0}
        lock = threading.Lock()

        def pair(prompt: int, thread: int) -> None:
            rows = torch.randperm(share, generator=torch.Generator().manual_seed(prompt))[:tokens] + thread * share
            slots = rows.to(self.device)
            kv_pattern.write(self.tensors, self.layout, self.spec, slots, prompt)
            self.engine.store(prompt_tokens(prompt, tokens), kvcaches=self.tensors, slot_mapping=slots)
            for wanted in (prompt, random.Random(prompt).randrange(first, prompt + 1)):
                kv_pattern.write(self.tensors, self.layout, self.spec, slots, wanted + _OTHER)
                flags = self.engine.retrieve(prompt_tokens(wanted, tokens), kvcaches=self.tensors, slot_mapping=slots)
                good = kv_pattern.matches(self.tensors, self.layout, self.spec, slots, wanted)
                with lock:
                    total["asked"] += tokens
                    total["loaded"] += int(flags.sum())
                    total["wrong"] += int((flags & ~good).sum())
                    total["complete"] += int(bool(flags.all()))

        def work(thread: int) -> None:
            for prompt in range(first + thread, first + count, threads):
                if self.device.type == "cpu":
                    pair(prompt, thread)
                    continue
                stream: Any = torch.cuda.Stream
                with torch.cuda.stream(stream(self.device)):
                    pair(prompt, thread)

        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(partial(work, thread)) for thread in range(threads)]:
                future.result()
        return {**total, "seconds": time.perf_counter() - start}

    def read_for(self, prompts: list[int], tokens: int, seconds: float) -> dict[str, Any]:
        """Retrieve the prompts in turn for some time, checking all. `longest`: seconds of the slowest retrieve."""
        end = time.monotonic() + seconds
        total: dict[str, Any] = {"rounds": 0, "loaded": 0, "wrong": 0, "longest": 0.0}
        while time.monotonic() < end:
            found = self.retrieve(prompts[total["rounds"] % len(prompts)], tokens, seed=total["rounds"])
            total["rounds"] += 1
            total["loaded"] += found["loaded"]
            total["wrong"] += found["wrong"]
            total["longest"] = max(total["longest"], found["seconds"])
        return total

    def hammer(self, prompts: list[int], tokens: int, seconds: float) -> dict[str, Any]:
        """Retrieve the prompts in turn for some time without a look at the bytes: as much load as one process makes. As
        `read_for`, but for `wrong`, which nobody counts here."""
        slots = self._mapping(tokens, "blocks", 0)
        ids = [prompt_tokens(prompt, tokens) for prompt in prompts]
        self._settle()
        end = time.monotonic() + seconds
        total: dict[str, Any] = {"rounds": 0, "loaded": 0, "longest": 0.0}
        while time.monotonic() < end:
            start = time.perf_counter()
            flags = self.engine.retrieve(ids[total["rounds"] % len(ids)], kvcaches=self.tensors, slot_mapping=slots)
            total["longest"] = max(total["longest"], time.perf_counter() - start)
            total["rounds"] += 1
            total["loaded"] += int(flags.sum())
        return total

    def store_forever(self, first: int, tokens: int) -> dict[str, Any]:
        """Store prompt after prompt until the process is killed, all with the KV of prompt `first`, so that nearly all of the
        time goes into storing."""
        slots = self._mapping(tokens, "blocks", 0)
        kv_pattern.write(self.tensors, self.layout, self.spec, slots, first)
        self._settle()
        prompt = first
        while True:
            self.engine.store(prompt_tokens(prompt, tokens), kvcaches=self.tensors, slot_mapping=slots)
            prompt += 1

    def lookup(self, prompt: int, tokens: int) -> dict[str, Any]:
        return {"found": self.engine.lookup(prompt_tokens(prompt, tokens))}

    def stats(self) -> dict[str, Any]:
        return self.engine.get_stats()

    def _mapping(self, tokens: int, mapping: str, seed: int) -> torch.Tensor:
        if mapping == "random":
            return random_mapping(tokens, self.slots, self.device, seed=seed)
        return block_mapping(tokens, self.block_size, self.slots, self.device, seed=seed)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes (a NaN equals itself). Blocks."""
    return bool(torch.equal(one.view(torch.uint8), other.view(torch.uint8)))


def main(settings: WorkerSettings) -> None:
    """Obey until the input ends. The answers own standard output: anything else printed there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(settings)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            found = getattr(worker, order.pop("operation"))(**order)
        except (VCacheError, RuntimeError, AssertionError, TypeError) as error:
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        answers.write(json.dumps(found, default=str) + "\n")
    worker.engine.close()


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=WorkerSettings))
