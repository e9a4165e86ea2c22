"""How fast lent memory comes back to its owner while others read it. The owner is this process; readers have their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from ..config import VCacheConfig
from ..errors import VCacheError
from ..lender.lender import Lender
from ..manager.connect import connect
from ..spec import KVCacheSpec
from ..worker import Worker
from .paged_data import CHUNK, LLAMA_8B, slab_size
from .pool_worker import PoolEngine, WorkerSettings, pool_worker
from .processes import manager_process
from .remote_slab import open_backing

_LOAD = 1.2
_BEFORE = 0.4
_TIMEOUT = 20.0
_SLAB_SLOTS = 8


class GiveBack(NamedTuple):
    """What is lent, and to whom."""

    nbytes: int
    """Lent in addition, and taken back."""
    kind: str = "cuda"
    owner: str = ""
    """UUID of the owner's GPU; empty: the first one."""
    device: str = "cuda"
    """torch device of the readers' caches, in their own counting."""
    environment: Mapping[str, str] = {}
    """Added to the readers' and the writer's."""
    spec: KVCacheSpec = LLAMA_8B
    tokens: int = 4096
    """Of each prompt that is read."""
    readers: int = 2
    rounds: int = 5


def measure(what: GiveBack, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rounds of: lend more, fill it, read it, take it back. Milliseconds and free bytes, as the owner sees them. Blocks for
    about two seconds a round. Raises `VCacheError`, also for a wrong byte."""
    slab = slab_size(what.spec, _SLAB_SLOTS)
    keep = 2 * slab
    prompts = max(2, what.nbytes // what.spec.payload_bytes(what.tokens))
    with ExitStack() as stack:
        address = stack.enter_context(manager_process()).address
        backing = open_backing(what.kind, what.owner)
        stack.callback(backing.close)
        config = VCacheConfig.from_env(
            {}, manager={"address": address}, segment={"kind": what.kind, "size": keep, "slab_size": slab}
        )
        api = connect(config, name="owner", role="lender", require=True)
        stack.callback(api.close)
        lender = Lender(api, backing, config.segment)
        stack.callback(lender.close)
        settings = WorkerSettings(
            config={"manager": {"address": address}, "segment": {"lend": False}},
            spec=what.spec,
            blocks=what.tokens // 16,
            device=what.device,
        )
        environment = dict(what.environment)
        workers = [stack.enter_context(pool_worker(settings, environment)) for _ in range(what.readers + 1)]
        writer, *readers = workers
        for worker in workers:
            worker.ready()
        writer.call(PoolEngine.store, prompt=90_000, tokens=CHUNK)
        for reader in readers:
            reader.call(PoolEngine.retrieve, prompt=90_000, tokens=CHUNK)
        rounds = []
        for number in range(what.rounds):
            progress(f"round {number + 1} of {what.rounds}")
            first = 1000 * (number + 1)
            rounds.append(_round(what, lender, writer, readers, list(range(first, first + prompts))))
        return rounds


def _round(what: GiveBack, lender: Lender, writer: Worker, readers: list[Worker], prompts: list[int]) -> dict[str, Any]:
    free = [lender.backing.available_bytes()]
    began = time.perf_counter()
    lender.grow(what.nbytes)
    grown = time.perf_counter() - began
    if not lender.wait_mounted(_TIMEOUT):
        raise VCacheError("the manager did not learn about the memory lent in addition")
    free.append(lender.backing.available_bytes())
    for prompt in prompts:
        writer.call(PoolEngine.store, prompt=prompt, tokens=what.tokens)
    for number, reader in enumerate(readers):
        there = reader.call(PoolEngine.retrieve, prompt=prompts[-1], tokens=what.tokens, seed=number)
        if (there.loaded, there.wrong) != (what.tokens, 0):
            raise VCacheError(f"before the shrink, a reader got {there}")
    begun = []
    for number, reader in enumerate(readers):
        # The last one looks at every byte; the others only read, so that transfers run all the time.
        order = PoolEngine.read_for if number == len(readers) - 1 else PoolEngine.hammer
        begun.append(reader.begin(order, prompts=prompts[number:] + prompts[:number], tokens=what.tokens, seconds=_LOAD))
    time.sleep(_BEFORE)  # the length of the load alone, not a synchronisation
    # Not the figure from before the load: readers and writer took memory of their own on this GPU since then.
    loaded = lender.backing.available_bytes()
    began = time.perf_counter()
    report = lender.shrink(what.nbytes)
    shrunk = time.perf_counter() - began
    enough = loaded + report.freed_bytes * 15 // 16
    while what.kind == "cuda" and lender.backing.available_bytes() < enough and time.perf_counter() - began < _TIMEOUT:
        time.sleep(0.0005)
    back = time.perf_counter() - began
    free.append(lender.backing.available_bytes())
    reads = [read.result() for read in begun]
    if wrong := sum(read.wrong or 0 for read in reads):
        raise VCacheError(f"I1: {wrong} tokens with wrong bytes while memory was taken back")
    return {
        "grown_ms": round(grown * 1e3, 2),
        "shrink_ms": round(shrunk * 1e3, 2),
        "free_ms": round(back * 1e3, 2),
        "slabs": report.slabs,
        "freed_bytes": report.freed_bytes,
        "late_importers": len(report.late),
        "free_bytes": {"before": free[0], "lent": free[1], "loaded": loaded, "after": free[2]},
        "reads": [{name: value for name, value in read._asdict().items() if value is not None} for read in reads],
    }
