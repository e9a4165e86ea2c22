"""The mover over slots, below the manager: time on the device, time of the call, and whether the bytes are right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import IntegrityError
from ..paged.layout import PagedCache
from ..paged.mover import Mover, SlotTransfer, Transfer
from .paged_data import CHUNK, WRITER, CacheArena, Slots, block_mapping, random_mapping
from .timing import Spread, repeats_for, timed_event, wall_seconds

if TYPE_CHECKING:
    import torch

Mapping = Literal["blocks", "random"]
"""Whole blocks in random order, or every token anywhere."""
Operation = Literal["store", "retrieve"]

_MAX_SETS = 64
_WARMUP = 3
_DELAY_CYCLES = 10_000_000
"""About 5 ms: the device waits this long, so that the host has queued everything before the clock starts."""


class MoverResult(NamedTuple):
    operation: Operation
    mapping: Mapping
    nbytes: int
    device: Spread
    """From the start of the first kernel to the end of the last copy, on the device. On CPU: that of the call."""
    call: Spread
    """From the call to the end of `wait`, on the host's clock."""


class MoverRuns:
    """Measures one mover between one paged cache and one set of slots.

    Different slots and rows in each run, as far as there are any, so that a small size is not served from a cache.
    """

    def __init__(
        self, arena: CacheArena, slots: Slots, cache: PagedCache, mover: Mover, first_generation: int, seconds: float = 0.5
    ) -> None:
        """`first_generation`: even, above all that these slots carry. `seconds`: about how long one thing is repeated."""
        self._budget = seconds
        self.arena, self.slots, self.cache, self.mover = arena, slots, cache, mover
        self.generation = first_generation
        self._device = cache.device

    def measure(self, nbytes: int, mapping: Mapping, *, repeats: int = 0) -> Iterator[MoverResult]:
        """Store, then retrieve `nbytes` of KV; checks the bytes. Blocks. Raises `IntegrityError` when bytes are wrong or a
        transfer was not verified."""
        tokens = nbytes // self.arena.spec.token_bytes
        chunks = -(-tokens // CHUNK)
        sets = max(1, min(_MAX_SETS, len(self.slots) // chunks))
        rows = [self._mapping(mapping, tokens, seed) for seed in range(sets)]
        stored: list[list[SlotTransfer]] = [[] for _ in range(sets)]

        repeats = repeats or self._repeats(tokens, rows[0])

        def plans() -> list[list[SlotTransfer]]:
            found = []
            for i in range(_WARMUP + repeats):
                self.generation += 2
                stored[i % sets] = self.slots.transfers(tokens, self.generation, first=i % sets * chunks)
                found.append(stored[i % sets])
            return found

        def store(i: int) -> Transfer:
            return self.mover.store(self.cache, rows[i % sets], writes[i], WRITER)

        def load(i: int) -> Transfer:
            return self.mover.load(self.cache, rows[i % sets], stored[i % sets])

        writes = plans()
        device = self._on_device(store, repeats)
        writes = plans()
        yield MoverResult("store", mapping, nbytes, device, self._called(store, repeats))
        used = min(sets, _WARMUP + repeats)
        self._check(rows[used - 1], self._mapping(mapping, tokens, 10_000), stored[used - 1])
        sets = used
        device = self._on_device(load, repeats)
        yield MoverResult("retrieve", mapping, nbytes, device, self._called(load, repeats))

    def _repeats(self, tokens: int, mapping: torch.Tensor) -> int:
        """From the time of one store; the first one compiles kernels."""
        for _ in range(2):
            self.generation += 2
            transfers = self.slots.transfers(tokens, self.generation)
            begin = time.perf_counter()
            finish(self.mover.store(self.cache, mapping, transfers, WRITER))
        return repeats_for(time.perf_counter() - begin, budget=self._budget)

    def _mapping(self, mapping: Mapping, tokens: int, seed: int) -> torch.Tensor:
        if mapping == "random":
            return random_mapping(tokens, self.arena.tokens, self._device, seed=seed)
        return block_mapping(tokens, self.cache.block_size, self.arena.tokens, self._device, seed=seed)

    def _check(self, source: torch.Tensor, target: torch.Tensor, transfers: list[SlotTransfer]) -> None:
        """Load into other rows and compare with those that were stored. Overwrites cache rows."""
        import torch

        last = self.arena.spec.num_layers - 1
        layers = sorted({0, last // 2, last})
        expected = [self.arena.rows(source, layer).clone() for layer in layers]
        finish(self.mover.store(self.cache, source, self._again(transfers), WRITER))
        self.arena.clear(layers)
        finish(self.mover.load(self.cache, target, transfers))
        for layer, rows in zip(layers, expected, strict=True):
            if not torch.equal(self.arena.rows(target, layer), rows):
                raise IntegrityError(f"I1: {len(source)} tokens came back with other bytes in layer {layer}")
        self.arena.fill(layers)

    def _again(self, transfers: list[SlotTransfer]) -> list[SlotTransfer]:
        """The same chunks with the next generation; changes `transfers` in place."""
        self.generation += 2
        transfers[:] = [t._replace(header=t.header._replace(generation=self.generation)) for t in transfers]
        return transfers

    def _called(self, start: Callable[[int], Transfer], repeats: int) -> Spread:
        def call(i: int) -> None:
            finish(start(i))

        return wall_seconds(call, repeats, warmup=_WARMUP)

    def _on_device(self, start: Callable[[int], Transfer], repeats: int) -> Spread:
        runs = [device_seconds(partial(start, i), self._device) for i in range(_WARMUP + repeats)]
        return Spread.of(runs[_WARMUP:])


def finish(transfer: Transfer) -> None:
    """Wait for a transfer. Raises `IntegrityError` unless all of it was verified."""
    transfer.wait()
    if not all(transfer.verified()):
        raise IntegrityError("I1: a transfer with nobody else around was not verified")


def device_seconds(start: Callable[[], Transfer], device: torch.device) -> float:
    """Device time of one transfer: the current stream is held up until the host has queued all of it. On CPU, the time of the
    call. Blocks. Raises `IntegrityError` unless all of it was verified."""
    import torch

    if device.type == "cpu":
        started = time.perf_counter()
        finish(start())
        return time.perf_counter() - started
    hold: Any = torch.cuda._sleep
    stream = torch.cuda.current_stream(device)
    begin, end = timed_event(), timed_event()
    with torch.cuda.device(device):
        hold(_DELAY_CYCLES)
        begin.record(stream)
        transfer: Any = start()
        transfer.wait_stream(stream)
        end.record(stream)
    finish(transfer)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
