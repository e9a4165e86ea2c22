"""An engine and a paged cache in a process of their own, told what to do: the other side of measurements and GPU tests.

KV comes from `kv_pattern`, so that every process knows what every prompt's bytes must be. Prompt `p` has the token ids
`p, 0, 1, 2, ...`: two prompts share no chunk. `pool_worker` starts one; what is asked of it are methods of `PoolEngine`.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from array import array
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import msgspec
import torch

from ..config import VCacheConfig
from ..engine import VCacheEngine
from ..errors import VCacheError
from ..keys import Chunk, TokenDatabase
from ..paged.mover import SlotTransfer
from ..spec import KVCacheSpec
from ..worker import Worker
from . import kv_pattern
from .mover_runs import device_seconds
from .paged_data import block_mapping, random_mapping

_OTHER = 1_000_000
"""Added to a prompt's number: what rows hold before something is retrieved into them."""


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


class Retrieved(NamedTuple):
    """`loaded`: tokens reported; `wrong`: of these, how many hold other bytes than they must."""

    seconds: float
    loaded: int
    wrong: int


class Beside(NamedTuple):
    """A `Retrieved`, and what became of the rest of the cache."""

    loaded: int
    wrong: int
    touched: bool
    """Whether any byte changed in rows outside of the mapping."""
    skipped_intact: bool
    """Whether the rows of skipped tokens were left alone."""


class Pairs(NamedTuple):
    """Sums over all pairs. `asked`, `loaded`, `wrong`: tokens; `complete`: retrieves that found everything."""

    asked: int
    loaded: int
    wrong: int
    complete: int
    seconds: float


class Reads(NamedTuple):
    """Sums over retrieves. `longest`: seconds of the slowest one; `wrong`: tokens, None where nobody looked."""

    rounds: int
    loaded: int
    longest: float
    wrong: int | None = None


def prompt_tokens(prompt: int, tokens: int) -> array[int]:
    """Token ids of a prompt."""
    return array("I", [prompt, *range(tokens - 1)])


class PoolEngine:
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

    def close(self) -> None:
        self.engine.close()

    def reopen(self, settings: WorkerSettings) -> None:
        """Close engine and cache, and begin anew: cheaper than another process."""
        self.engine.close()
        self.tensors = []
        self._open(settings)

    def store(self, prompt: int, tokens: int, mapping: str = "blocks", seed: int = 0) -> float:
        """Put the prompt's KV into the cache, and store it. Seconds of the store alone."""
        slots = self._mapping(tokens, mapping, seed)
        kv_pattern.write(self.tensors, self.layout, self.spec, slots, prompt)
        self._settle()
        start = time.perf_counter()
        self.engine.store(prompt_tokens(prompt, tokens), kvcaches=self.tensors, slot_mapping=slots)
        return time.perf_counter() - start

    def retrieve(
        self, prompt: int, tokens: int, mapping: str = "blocks", seed: int = 0, skip: int = 0, content: int = -1
    ) -> Retrieved:
        """Retrieve into rows that held something else. They must then hold the prompt's bytes, or those of prompt `content`."""
        content = prompt if content < 0 else content
        slots = self._mapping(tokens, mapping, seed)
        kv_pattern.write(self.tensors, self.layout, self.spec, slots, content + _OTHER)
        self._settle()
        mask = [i >= skip for i in range(tokens)] if skip else None
        start = time.perf_counter()
        flags = self.engine.retrieve(prompt_tokens(prompt, tokens), mask, kvcaches=self.tensors, slot_mapping=slots)
        seconds = time.perf_counter() - start
        good = kv_pattern.matches(self.tensors, self.layout, self.spec, slots, content)
        return Retrieved(seconds, int(flags.sum()), int((flags & ~good).sum()))

    def retrieve_beside(self, prompt: int, tokens: int, mapping: str, seed: int, skip: int = 0) -> Beside:
        """`retrieve`, all but the first `skip` tokens. Copies the cache."""
        before = [tensor.clone() for tensor in self.tensors]
        found = self.retrieve(prompt, tokens, mapping, seed, skip)
        slots = self._mapping(tokens, mapping, seed)
        intact = kv_pattern.matches(self.tensors, self.layout, self.spec, slots[:skip], prompt + _OTHER)
        for tensors in (before, self.tensors):
            kv_pattern.write(tensors, self.layout, self.spec, slots, prompt)
        touched = not all(same_bytes(one, other) for one, other in zip(before, self.tensors, strict=True))
        return Beside(found.loaded, found.wrong, touched, bool(intact.all()))

    def freeze(self) -> None:
        """Take what lives now out of the garbage collector's sight."""
        gc.collect()
        gc.freeze()

    def time_retrieve(self, prompt: int, tokens: int, runs: int, mapping: str = "blocks", unnamed: bool = False) -> list[float]:
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
        return seconds

    def time_kernels(self, prompt: int, tokens: int, runs: int) -> list[float]:
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
            return [device_seconds(load, self.device) for load in loads]
        finally:
            for slot in slots:
                pool.segments.unpin(slot)
            pool.release(lease.id)

    def pairs(self, first: int, count: int, tokens: int, threads: int) -> Pairs:
        """`count` prompts from `first` on: each is stored, then it and another one are retrieved and checked; `threads` at a
        time, each in rows of its own."""
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
        return Pairs(**total, seconds=time.perf_counter() - start)

    def read_for(self, prompts: list[int], tokens: int, seconds: float) -> Reads:
        """Retrieve the prompts in turn for some time, checking all."""
        end = time.monotonic() + seconds
        found: list[Retrieved] = []
        while time.monotonic() < end:
            found.append(self.retrieve(prompts[len(found) % len(prompts)], tokens, seed=len(found)))
        longest = max((each.seconds for each in found), default=0.0)
        return Reads(len(found), sum(each.loaded for each in found), longest, sum(each.wrong for each in found))

    def hammer(self, prompts: list[int], tokens: int, seconds: float) -> Reads:
        """Retrieve the prompts in turn for some time without a look at the bytes: as much load as one process makes."""
        slots = self._mapping(tokens, "blocks", 0)
        ids = [prompt_tokens(prompt, tokens) for prompt in prompts]
        self._settle()
        end = time.monotonic() + seconds
        rounds, loaded, longest = 0, 0, 0.0
        while time.monotonic() < end:
            start = time.perf_counter()
            flags = self.engine.retrieve(ids[rounds % len(ids)], kvcaches=self.tensors, slot_mapping=slots)
            longest = max(longest, time.perf_counter() - start)
            rounds += 1
            loaded += int(flags.sum())
        return Reads(rounds, loaded, longest)

    def store_forever(self, first: int, tokens: int) -> None:
        """Store prompt after prompt until the process is killed, all with the KV of prompt `first`, so that nearly all of the
        time goes into storing."""
        slots = self._mapping(tokens, "blocks", 0)
        kv_pattern.write(self.tensors, self.layout, self.spec, slots, first)
        self._settle()
        prompt = first
        while True:
            self.engine.store(prompt_tokens(prompt, tokens), kvcaches=self.tensors, slot_mapping=slots)
            prompt += 1

    def lookup(self, prompt: int, tokens: int) -> int:
        return self.engine.lookup(prompt_tokens(prompt, tokens))

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self.engine.get_stats()["counters"]
        return found

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


def pool_worker(settings: WorkerSettings, env: Mapping[str, str] | None = None) -> Worker:
    """A process with a `PoolEngine`. Does not wait until it is made. `env`: added to this process's environment."""
    return Worker(PoolEngine, {"settings": settings}, name=settings.name, env={**os.environ, **(env or {})}, grace=30.0)
