"""What running work loses while KV moves: a matrix product and decoding beside the mover, by grid size, and copy engines.

The work is measured alone before and after every pairing, and compared with the mean of the two: a GPU slows down as it gets
warm.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..errors import VCacheError
from .moves import Move
from .timing import timed_event

if TYPE_CHECKING:
    import torch

_SIZE = 8192
"""The product is `_SIZE` cubed, bf16: about 1.4 ms on an H100. Decoding reads matrices of this size."""
_DECODE_MATRICES = 16
_DECODE_ROWS = 32
_SECONDS = 0.35


class Work(Protocol):
    """Something that keeps a GPU busy."""

    name: str
    unit: str
    where: str

    def rate(self, seconds: float) -> float:
        """How fast it runs, over about `seconds`. Blocks."""
        ...


class Interference(NamedTuple):
    """One pairing of work with a mover of bytes, both running all the time."""

    path: str
    grid: int
    alone: float
    """Rate of the work without the mover: mean of before and after."""
    beside: float
    gbps_alone: float
    gbps: float
    work: str = "matrix product"
    unit: str = "TFLOP/s"
    where: str = ""
    """On which GPU the work runs, in words."""

    @property
    def loss(self) -> float:
        """Share of the work's speed that is lost, 0 to 1."""
        return 1 - self.beside / self.alone

    def row(self) -> dict[str, Any]:
        """For a report; `tflops` only for a matrix product."""
        label = f"{self.work}{f' on the {self.where}' if self.where else ''} beside {self.path}"
        found = {"path": label, "operation": "interference", "grid": self.grid, "work": self.work, "unit": self.unit}
        found |= {"where": self.where, "moves": self.path, "rate": self.beside, "rate_alone": self.alone, "loss": self.loss}
        found |= {"gbps": self.gbps, "gbps_alone": self.gbps_alone}
        if self.unit == "TFLOP/s":
            found |= {"tflops": self.beside, "tflops_alone": self.alone}
        return found

    def line(self) -> str:
        return (
            f"{self.row()['path']} (grid {self.grid or '-'}): {self.beside:,.0f} of {self.alone:,.0f} {self.unit} "
            f"({self.loss:.1%} lost), moving {self.gbps:.0f} GB/s ({self.gbps_alone:.0f} alone)"
        )


class Products:
    """A stream of matrix products on one GPU: what prefill does."""

    name, unit = "matrix product", "TFLOP/s"

    def __init__(self, device: torch.device, where: str = "") -> None:
        import torch

        self.device, self.where = device, where
        self._a = torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device=device)
        self._b = torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device=device)
        self._out = torch.empty_like(self._a)
        stream: Any = torch.cuda.Stream
        self._stream = stream(device)

    def rate(self, seconds: float) -> float:
        """TFLOP/s."""
        once = self._run(5) / 5
        count = max(10, int(seconds / once))
        return 2 * _SIZE**3 * count / self._run(count) / 1e12

    def _run(self, count: int) -> float:
        import torch

        def product() -> None:
            torch.mm(self._a, self._b, out=self._out)

        return _seconds(self.device, self._stream, product, count)


class Decoding:
    """A stream of thin products that read a different 128 MiB of weights each: what decoding does. Needs 2 GiB."""

    name, unit = "decoding", "GB/s"

    def __init__(self, device: torch.device, where: str = "") -> None:
        import torch

        self.device, self.where = device, where
        make: Any = torch.cuda.Stream
        self._stream = make(device)
        self._input = torch.randn(_DECODE_ROWS, _SIZE, dtype=torch.bfloat16, device=device)
        self._weights = [torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device=device) for _ in range(_DECODE_MATRICES)]
        self._out = torch.empty_like(self._input)
        graph: Any = torch.cuda.CUDAGraph
        self._graph = graph()
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(self._stream):
            self._step()
            self._stream.synchronize()
            # The launches of a graph need no time of the host's, which the mover's thread takes its part of.
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._step()

    def _step(self) -> None:
        import torch

        for weights in self._weights:
            torch.mm(self._input, weights, out=self._out)

    def rate(self, seconds: float) -> float:
        """GB/s of weights read."""
        once = self._run(5) / 5
        count = max(10, int(seconds / once))
        return 2 * _SIZE**2 * _DECODE_MATRICES * count / self._run(count) / 1e9

    def _run(self, count: int) -> float:
        return _seconds(self.device, self._stream, self._graph.replay, count)


def _seconds(device: torch.device, stream: torch.cuda.Stream, action: Callable[[], None], count: int) -> float:
    import torch

    begin, end = timed_event(), timed_event()
    with torch.cuda.device(device), torch.cuda.stream(stream):
        begin.record(stream)
        for _ in range(count):
            action()
        end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


class Load:
    """Repeats `move` (which blocks until `nbytes` have moved) in a thread. A context manager."""

    def __init__(self, move: Callable[[], None], nbytes: int) -> None:
        self._move, self._nbytes = move, nbytes
        self._stop, self._running = threading.Event(), threading.Event()
        self._rounds, self._seconds = 0, 1.0
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._loop, name="vcache-bench-load", daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        self._running.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._errors:
            raise self._errors[0]

    @property
    def gbps(self) -> float:
        """Achieved rate, once over."""
        return self._rounds * self._nbytes / self._seconds / 1e9

    def _loop(self) -> None:
        try:
            self._move()
            begin = time.perf_counter()
            self._running.set()
            while not self._stop.is_set():
                self._move()
                self._rounds += 1
            self._seconds = time.perf_counter() - begin
        except (RuntimeError, VCacheError) as error:
            self._errors.append(error)
        finally:
            self._running.set()


def measure(moves: Sequence[Move], works: Sequence[Work], *, seconds: float = _SECONDS) -> Iterator[Interference]:
    """Pair every work with every move; last, with nothing: how much the speed varies by itself. About 1 s a pairing. Blocks."""
    alone = [work.rate(seconds) for work in works]
    for move in moves:
        with Load(move.run, move.nbytes) as quiet:
            time.sleep(seconds / 2)  # the length of the measurement, not a synchronisation
        for number, work in enumerate(works):
            with Load(move.run, move.nbytes) as load:
                beside = work.rate(seconds)
            after = work.rate(seconds / 2)
            mean, alone[number] = (alone[number] + after) / 2, after
            yield Interference(move.path, move.grid, mean, beside, quiet.gbps, load.gbps, work.name, work.unit, work.where)
    for number, work in enumerate(works):
        beside, after = work.rate(seconds), work.rate(seconds / 2)
        mean = (alone[number] + after) / 2
        yield Interference("nothing", 0, mean, beside, 0.0, 0.0, work.name, work.unit, work.where)
