"""The ways around VCache, for comparison: plain copies on a GPU, between GPUs, and through host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from .timing import Spread, event_seconds, repeats_for, wall_seconds

if TYPE_CHECKING:
    import torch

_PIECE = 16 * 2**20
"""Bytes of one piece of a pipelined bounce: large enough for full PCIe speed, small enough to overlap."""


class RawCopy(NamedTuple):
    """One measured copy of `nbytes`, counted once (not read plus written)."""

    path: str
    nbytes: int
    seconds: Spread


class RawCopies:
    """Buffers for copies of up to `nbytes` between `source` and `target` (may be one GPU). Holds 2 x `nbytes` of VRAM and
    `nbytes` of pinned memory."""

    def __init__(self, nbytes: int, source: torch.device, target: torch.device) -> None:
        import torch

        self.source_device, self.target_device = source, target
        self.source = torch.empty(nbytes, dtype=torch.uint8, device=source)
        self.source.view(torch.int64).random_()
        self.target = torch.empty(nbytes, dtype=torch.uint8, device=target)
        self.pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        stream: Any = torch.cuda.Stream
        self._down, self._up = stream(source), stream(target)

    def measure(self, nbytes: int, *, pageable: bool = True) -> Iterator[RawCopy]:
        """All ways for one size (a divisor of the buffer's size is moved through it, so that caches do not serve small ones).
        Blocks."""
        pieces = max(1, min(64, self.source.numel() // nbytes))

        def part(buffer: torch.Tensor, run: int) -> torch.Tensor:
            start = run % pieces * nbytes
            return buffer[start : start + nbytes]

        def on(path: str, action: Callable[[int], object], device: torch.device, rate: float) -> RawCopy:
            return RawCopy(path, nbytes, event_seconds(action, device, repeats_for(nbytes / rate)))

        same = self.source_device == self.target_device
        copy = lambda i: part(self.target, i).copy_(part(self.source, i), non_blocking=True)  # noqa: E731
        yield on("d2d" if same else "peer copy", copy, self.target_device, 2e11)
        yield on("h2d", lambda i: part(self.target, i).copy_(part(self.pinned, i), non_blocking=True), self.target_device, 5e10)
        yield on("d2h", lambda i: part(self.pinned, i).copy_(part(self.source, i), non_blocking=True), self.source_device, 5e10)
        runs = repeats_for(nbytes / 2.5e10)
        yield RawCopy("bounce serial", nbytes, wall_seconds(lambda i: self._serial(*self._parts(part, i)), runs))
        yield RawCopy("bounce pipelined", nbytes, wall_seconds(lambda i: self._pipelined(*self._parts(part, i)), runs))
        if pageable:
            runs = repeats_for(nbytes / 5e8, budget=2.0, least=2)
            yield RawCopy(
                "bounce pageable", nbytes, wall_seconds(lambda i: self._pageable(*self._parts(part, i)), runs, warmup=1)
            )

    def check(self) -> bool:
        """Whether a pipelined bounce of everything moves the right bytes. Blocks."""
        import torch

        self.target.zero_()
        torch.cuda.current_stream(self.target_device).synchronize()
        self._pipelined(self.source, self.pinned, self.target)
        return bool(torch.equal(self.source, self.target.to(self.source_device)))

    def _parts(self, part: Callable[[torch.Tensor, int], torch.Tensor], run: int) -> tuple[torch.Tensor, ...]:
        return part(self.source, run), part(self.pinned, run), part(self.target, run)

    def _serial(self, source: torch.Tensor, pinned: torch.Tensor, target: torch.Tensor) -> None:
        """Everything down, then everything up."""
        import torch

        pinned.copy_(source, non_blocking=True)
        torch.cuda.current_stream(self.source_device).synchronize()
        target.copy_(pinned, non_blocking=True)
        torch.cuda.current_stream(self.target_device).synchronize()

    def _pipelined(self, source: torch.Tensor, pinned: torch.Tensor, target: torch.Tensor) -> None:
        """Piece by piece: one goes up while the next comes down."""
        import torch

        for start in range(0, source.numel(), _PIECE):
            piece = slice(start, start + _PIECE)
            with torch.cuda.device(self.source_device), torch.cuda.stream(self._down):
                pinned[piece].copy_(source[piece], non_blocking=True)
                landed = self._down.record_event()
            with torch.cuda.device(self.target_device), torch.cuda.stream(self._up):
                self._up.wait_event(landed)
                target[piece].copy_(pinned[piece], non_blocking=True)
        self._down.synchronize()
        self._up.synchronize()

    def _pageable(self, source: torch.Tensor, pinned: torch.Tensor, target: torch.Tensor) -> None:
        """What `.cpu()` and `.to(device)` do: through memory that is not pinned."""
        import torch

        target.copy_(source.cpu())
        torch.cuda.current_stream(self.target_device).synchronize()
