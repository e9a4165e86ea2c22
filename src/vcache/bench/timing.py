"""Timing of device work: CUDA events around it, warmed up, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class Spread(NamedTuple):
    """Seconds: median, fastest and slowest of `runs` runs."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def gbps(self, nbytes: int) -> float:
        """GB/s (10^9 bytes) at the median."""
        return nbytes / self.median / 1e9


def timed_event() -> Any:
    """A `torch.cuda.Event` that can tell the time."""
    import torch

    event: Any = torch.cuda.Event
    return event(enable_timing=True)


def event_seconds(action: Callable[[int], object], device: torch.device, repeats: int, *, warmup: int = 3) -> Spread:
    """Seconds between two events on the current stream around `action(i)`, which must order its work with that stream.
    Blocks. `i` counts all runs, the warm-up too, so that the action can change buffers."""
    import torch

    for i in range(warmup):
        action(i)
    torch.cuda.current_stream(device).synchronize()
    seconds = []
    for i in range(warmup, warmup + repeats):
        start, end = timed_event(), timed_event()
        start.record(torch.cuda.current_stream(device))
        action(i)
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return Spread.of(seconds)


def wall_seconds(action: Callable[[int], object], repeats: int, *, warmup: int = 2) -> Spread:
    """Wall-clock seconds of `action(i)`, which must return only when its work is done. Blocks."""
    for i in range(warmup):
        action(i)
    seconds = []
    for i in range(warmup, warmup + repeats):
        start = time.perf_counter()
        action(i)
        seconds.append(time.perf_counter() - start)
    return Spread.of(seconds)


def repeats_for(seconds: float, *, budget: float = 0.5, least: int = 3, most: int = 20) -> int:
    """How often to repeat something that takes `seconds`, so that all runs take about `budget` seconds."""
    return max(least, min(most, int(budget / max(seconds, 1e-6))))
