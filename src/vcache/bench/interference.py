"""What a running matrix product loses while KV moves: the mover by grid size, and copy engines, in one run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import TransferConfig
from ..errors import IntegrityError
from ..paged.layout import PagedCache
from ..paged.mover import Mover, SlotTransfer
from ..paged.select import mover_for
from .mover_runs import finish
from .paged_data import WRITER, CacheArena, Slots, block_mapping
from .timing import timed_event

if TYPE_CHECKING:
    import torch

GRIDS = (4, 8, 16, 32, 64, 132, 264)
_SIZE = 8192
"""The product is `_SIZE` cubed, bf16: about 1.4 ms on an H100."""
_SECONDS = 0.4
_BLOCK = 16


class Interference(NamedTuple):
    """One pairing of a matrix product with a mover of bytes, both running all the time."""

    path: str
    grid: int
    """Programs of the mover's launch; 0 where a copy engine or the driver's own kernel moves the bytes."""
    tflops_alone: float
    tflops: float
    gbps_alone: float
    gbps: float

    @property
    def loss(self) -> float:
        """Share of the product's speed that is lost, 0 to 1."""
        return 1 - self.tflops / self.tflops_alone


class Products:
    """A stream of matrix products on one GPU."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self._a = torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device=device)
        self._b = torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device=device)
        self._out = torch.empty_like(self._a)
        stream: Any = torch.cuda.Stream
        self._stream = stream(device)

    def tflops(self, seconds: float) -> float:
        """Rate over about `seconds`. Blocks."""
        once = self._run(5) / 5
        count = max(10, int(seconds / once))
        return 2 * _SIZE**3 * count / self._run(count) / 1e12

    def _run(self, count: int) -> float:
        import torch

        begin, end = timed_event(), timed_event()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            begin.record(self._stream)
            for _ in range(count):
                torch.mm(self._a, self._b, out=self._out)
            end.record(self._stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class Load:
    """Repeats `move` (which blocks until `nbytes` have moved) in a thread. A context manager."""

    def __init__(self, move: Callable[[], None], nbytes: int) -> None:
        self._move, self._nbytes = move, nbytes
        self._stop = threading.Event()
        self._running = threading.Event()
        self._rounds = 0
        self._seconds = 0.0
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._loop, name="vcache-bench-load")

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
        except (RuntimeError, IntegrityError) as error:
            self._errors.append(error)
        finally:
            self._running.set()


def measure(
    arena: CacheArena,
    places: Sequence[tuple[str, Slots]],
    nbytes: int,
    first_generation: int,
    raw: Sequence[tuple[str, Callable[[], None]]] = (),
    *,
    grids: Sequence[int] = GRIDS,
) -> Iterator[Interference]:
    """Retrieve `nbytes` at a time from each of `places` (name, slots) with every grid, then each of `raw` (name, a blocking
    copy of `nbytes`); last, nothing: how much the speed varies by itself. About 0.8 s a pairing. Blocks."""
    cache = arena.cache(_BLOCK)
    products = Products(cache.device)
    alone = products.tflops(_SECONDS)
    mapping = block_mapping(nbytes // arena.spec.token_bytes, _BLOCK, arena.tokens, cache.device)
    for name, slots in places:
        transfers = slots.transfers(len(mapping), first_generation)
        for grid in grids:
            mover = mover_for(cache, TransferConfig(grid=grid))
            if grid == grids[0]:
                finish(mover.store(cache, mapping, transfers, WRITER))
            yield _pair(name, grid, alone, products, partial(_load, mover, cache, mapping, transfers), nbytes)
    for name, copy in raw:
        yield _pair(name, 0, alone, products, copy, nbytes)
    yield Interference("nothing", 0, alone, products.tflops(_SECONDS), 0.0, 0.0)


def _load(mover: Mover, cache: PagedCache, mapping: torch.Tensor, transfers: Sequence[SlotTransfer]) -> None:
    finish(mover.load(cache, mapping, transfers))


def _pair(name: str, grid: int, alone: float, products: Products, move: Callable[[], None], nbytes: int) -> Interference:
    with Load(move, nbytes) as quiet:
        time.sleep(_SECONDS / 2)  # the length of the measurement, not a synchronisation
    with Load(move, nbytes) as load:
        tflops = products.tflops(_SECONDS)
    return Interference(name, grid, alone, tflops, quiet.gbps, load.gbps)
