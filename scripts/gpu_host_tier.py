"""Slots in host memory by the mover's kernels and by copy engines through a ring: loads and stores of 1.25 GiB (40 chunks of
32 MiB, 8B shape) alone, beside prefill and decoding in this process, and beside the same in another process on the same GPU.

usage: python3 scripts/gpu_host_tier.py OUT.json [--chunks 40] [--seconds 2.0] [--staging MIB,...]
       TRITON_INTERPRET=1 python3 scripts/gpu_host_tier.py OUT.json --cpu

Needs one GPU with 12 GiB free, 3 GiB of host memory that may be pinned, and vcache[cuda]. Takes about a minute and a half.
`--cpu` tries the script itself: a tiny cache in host memory, and no neighbours.
Prints, for each way and each neighbour, median and 90th percentile of a request in ms, the host's time of the call, and the
share of its speed that the neighbour loses while requests follow each other; writes the same to OUT.json after every line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch

from vcache.bench.interference import Decoding, Products
from vcache.bench.paged_data import CHUNK, LLAMA_8B, WRITER, CacheArena, Slots, block_mapping, slab_size
from vcache.paged.gpu_mover import GpuMover
from vcache.paged.mover import SlotTransfer
from vcache.segment.backing import MappedSlab
from vcache.spec import KVCacheSpec

MIB = 2**20
WORKS: dict[str, Callable[[torch.device], Any]] = {"prefill": Products, "decode": Decoding}
PLACES = (("", ""), ("prefill", "same"), ("decode", "same"), ("prefill", "other"), ("decode", "other"))
SLICE = 0.2
"""Seconds over which a neighbour takes its speed."""
START = 60.0


class Requests:
    """Loads and stores of the same chunks again and again, one at a time."""

    def __init__(
        self, mover: GpuMover, arena: CacheArena, slots: Slots, mapping: torch.Tensor, generations: Iterator[int]
    ) -> None:
        """`generations`: even and growing, shared by all who store into these slots."""
        self._mover, self._cache, self._mapping = mover, arena.cache(16), mapping
        self._slots, self._generations = slots, generations
        self._transfers: list[SlotTransfer] = []
        mover.prepare(self._cache)

    def once(self, store: bool) -> tuple[float, float]:
        """Seconds of one request, and of the call that queues it. A load is of what was stored last, by this object. Blocks."""
        if store:
            self._transfers = self._slots.transfers(len(self._mapping), next(self._generations))
        began = time.perf_counter()
        if store:
            under_way = self._mover.store(self._cache, self._mapping, self._transfers, WRITER)
        else:
            under_way = self._mover.load(self._cache, self._mapping, self._transfers)
        called = time.perf_counter()
        under_way.wait()
        over = time.perf_counter()
        assert all(under_way.verified())
        return over - began, called - began

    def repeat(self, store: bool, seconds: float, least: int) -> list[tuple[float, float]]:
        """At least `least` requests, and for `seconds`."""
        end, found = time.perf_counter() + seconds, [self.once(store)]
        while len(found) < least or time.perf_counter() < end:
            found.append(self.once(store))
        return found


def pinned_slab(nbytes: int, pinned: bool) -> MappedSlab:
    memory = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)
    address = memory.data_ptr()
    return MappedSlab("host", "host", nbytes, address, device_address=address, resource=memory)


def right_bytes(arena: CacheArena, requests: Requests, mapping: torch.Tensor) -> bool:
    """Whether what is loaded is what was stored."""
    requests.once(True)
    layers = (0, arena.spec.num_layers - 1)
    before = [arena.rows(mapping, layer).clone() for layer in layers]
    arena.clear(range(arena.spec.num_layers))
    requests.once(False)
    return all(torch.equal(rows, arena.rows(mapping, layer)) for rows, layer in zip(before, layers, strict=True))


def neighbour_process(kind: str, pipe: Any) -> None:
    """Works all the time in another process; answers each "rate" with the speed since the last one."""
    work = WORKS[kind](torch.device("cuda", 0))
    work.rate(SLICE)
    pipe.send("ready")
    rates: list[float] = []
    while True:
        while pipe.poll():
            if pipe.recv() == "stop":
                return
            pipe.send(sum(rates) / max(1, len(rates)))
            rates.clear()
        rates.append(work.rate(SLICE))


class OtherProcess:
    """A neighbour on the same GPU with a context of its own: the two take turns."""

    def __init__(self, kind: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=neighbour_process, args=(kind, there), daemon=True)
        self._process.start()
        there.close()
        if not self._pipe.poll(START):
            raise SystemExit(f"no {kind} in another process after {START:.0f} s")
        self._pipe.recv()

    def rate(self) -> float:
        """Mean speed since the last call."""
        self._pipe.send("rate")
        if not self._pipe.poll(START):
            raise SystemExit("the other process says nothing")
        return float(self._pipe.recv())

    def close(self) -> None:
        self._pipe.send("stop")
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


class SameProcess:
    """A neighbour in a thread of this process, on a stream of its own."""

    def __init__(self, kind: str) -> None:
        self._work = WORKS[kind](torch.device("cuda", 0))
        self._work.rate(SLICE)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._rates: list[float] = []
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while not self._stop.is_set():
            rate = self._work.rate(SLICE)
            with self._lock:
                self._rates.append(rate)

    def rate(self) -> float:
        """Mean speed since the last call."""
        with self._lock:
            rates, self._rates = self._rates, []
        return sum(rates) / max(1, len(rates))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def neighbour(kind: str, where: str) -> Iterator[Any]:
    if not kind:
        yield None
        return
    found = SameProcess(kind) if where == "same" else OtherProcess(kind)
    try:
        yield found
    finally:
        found.close()


def measure(requests: Requests, store: bool, beside: Any, seconds: float, least: int) -> dict[str, Any]:
    for before in dict.fromkeys((True, store)):
        requests.once(before)  # a load needs something that was stored
    alone = 0.0
    if beside is not None:
        beside.rate()
        time.sleep(3 * SLICE)  # the length of the measurement, not a synchronisation
        alone = beside.rate()
    found = requests.repeat(store, seconds, least)
    rate = beside.rate() if beside is not None else 0.0
    whole, call = (sorted(1e3 * each[part] for each in found) for part in (0, 1))
    return {
        "ms": whole[len(whole) // 2],
        "ms_p90": whole[min(len(whole) - 1, int(0.9 * len(whole)))],
        "call_ms": call[len(call) // 2],
        "runs": len(whole),
        "rate_alone": alone,
        "rate": rate,
        "loss": 1 - rate / alone if alone else 0.0,
    }


def line(row: dict[str, Any], nbytes: int) -> str:
    beside = f"{row['beside']} ({row['process']} process)" if row["process"] else row["beside"]
    text = f"{row['operation']:5} by {row['way']:12} beside {beside:23}: {row['ms']:7.1f} ms, p90 {row['ms_p90']:7.1f}, "
    text += f"{nbytes / row['ms'] / 1e6:5.1f} GB/s, call {row['call_ms']:5.2f} ms, {row['runs']:3} runs"
    return text + (f", neighbour loses {row['loss']:.1%} of {row['rate_alone']:,.0f}" if row["process"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--staging", default="256", help="MiB of the rings; several, separated by commas, are a way each")
    parser.add_argument("--cpu", action="store_true", help="a dry run, under TRITON_INTERPRET=1")
    arguments = parser.parse_args()
    if not arguments.cpu and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    device = torch.device("cpu") if arguments.cpu else torch.device("cuda", 0)
    spec, chunks, seconds, least, unit = LLAMA_8B, arguments.chunks, arguments.seconds, 5, MIB
    if arguments.cpu:
        spec = KVCacheSpec(model="tiny", dtype="bfloat16", num_layers=1, num_kv_heads=1, head_size=8)
        chunks, seconds, least, unit = 3, 0.0, 1, 256
    tokens = chunks * CHUNK
    nbytes = spec.payload_bytes(tokens)
    arena = CacheArena(spec, tokens, device)
    slots = Slots(spec, [pinned_slab(slab_size(spec, chunks), not arguments.cpu)])
    mapping = block_mapping(tokens, 16, tokens, device)
    movers = {"kernels": GpuMover(device)}
    for text in arguments.staging.split(","):
        movers[f"ring {text} MiB"] = GpuMover(device, staging=int(text) * unit, ring_from=0)
    report: dict[str, Any] = {
        "gpu": "none" if arguments.cpu else torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "nbytes": nbytes,
        "chunks": chunks,
        "rows": [],
    }
    print(f"{report['gpu']}, {nbytes / 2**30:.2f} GiB in {chunks} chunks", flush=True)
    generations = itertools.count(2, 2)
    ways = {way: Requests(mover, arena, slots, mapping, generations) for way, mover in movers.items()}
    for way, requests in ways.items():
        if not right_bytes(arena, requests, mapping):
            raise SystemExit(f"{way}: WRONG BYTES")
    for kind, where in PLACES[:1] if arguments.cpu else PLACES:
        with neighbour(kind, where) as beside:
            for store in (False, True):
                for way, requests in ways.items():
                    row = {"way": way, "operation": "store" if store else "load", "beside": kind or "nothing", "process": where}
                    row |= measure(requests, store, beside, seconds if kind else seconds / 2, least)
                    report["rows"].append(row)
                    arguments.out.write_text(json.dumps(report, indent=1))
                    print(line(row, nbytes), flush=True)


if __name__ == "__main__":
    main()
