"""`vcache bench trace`: hit ratios of the manager's directory over traces of real requests, by capacity and policy.

The directory is the real one, in this process, with the trace's clock; only memory is missing, which it never touches.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

import msgspec

from ..config import ByteSize, ManagerConfig
from ..errors import ArgumentError
from ..keys import DIGEST_BYTES
from ..manager.api import Acquire, GateReport, Mount, PutEnd, PutRequest, PutStart, Release, Ticket, Verb
from ..manager.directory.directory import Directory
from ..manager.directory.jobs import Job
from ..manager.directory.reading import PackedReply
from ..segment.slots import ALIGNMENT, HEADER_BYTES, SegmentInfo, SlabInfo, SlabInventory, slab_bytes_for
from .report import Column, Report
from .trace_files import Trace

SHARES = ("2%", "5%", "10%", "25%", "50%")
POLICIES = ("lru", "lru+reuse", "sieve", "sieve+reuse")
BASELINE = "lru"

_ENGINE, _LENDER, _NAMESPACE = b"engine".ljust(DIGEST_BYTES), b"lender".ljust(DIGEST_BYTES), bytes(DIGEST_BYTES)
_SLOTS = 1 << 16
"""Slots of one slab at most."""

COLUMNS = (
    Column("trace", "trace"),
    Column("capacity", "capacity"),
    Column("blocks", "blocks", ",d"),
    Column("policy", "policy"),
    Column("hit_ratio", "hit ratio", ".4f"),
    Column("of_lru", "of LRU", ".3f"),
    Column("stored", "stored", ",d"),
    Column("evictions", "evicted", ",d"),
    Column("not_stored", "not stored", ",d"),
    Column("cpu_seconds", "CPU s", ".1f"),
)


class TracePolicy(NamedTuple):
    """A named policy of the manager."""

    name: str
    config: ManagerConfig


class Replayed(NamedTuple):
    """What one replay came to. In blocks."""

    asked: int
    hits: int
    stored: int
    evictions: int
    not_stored: int
    """Missing blocks that found no room, or were not let in."""


def policy_of(name: str) -> TracePolicy:
    """Read `EVICTION` or `EVICTION+ADMISSION`, as of `manager.eviction` and `manager.admission`. Raises `ArgumentError`."""
    eviction, _, admission = name.partition("+")
    hints = get_type_hints(ManagerConfig)
    for value, key in ((eviction, "eviction"), (admission or "all", "admission")):
        if value not in get_args(hints[key]):
            raise ArgumentError(f"--policy {name}: {key} is one of {', '.join(get_args(hints[key]))}, got {value!r}")
    return TracePolicy(name, msgspec.convert({"eviction": eviction, "admission": admission or "all"}, ManagerConfig))


def capacity_of(text: str, trace: Trace, token_bytes: int) -> int:
    """Read a capacity: `10%` of the trace's different blocks, or bytes at `token_bytes` for each token; in blocks. Raises
    `ArgumentError`."""
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    try:
        blocks = float(share[1]) / 100 * trace.unique if share else ByteSize.parse(text) / token_bytes / trace.block_tokens
    except ValueError as error:
        raise ArgumentError(f"--capacity {text}: neither a share such as 10% nor a size: {error}") from None
    if blocks < 1:
        raise ArgumentError(f"--capacity {text}: less than one block of {trace.name}")
    return int(blocks)


class Replay:
    """A directory with one engine and one lender on one host, and room for so many blocks."""

    def __init__(self, config: ManagerConfig, blocks: int) -> None:
        self.directory = Directory(config, epoch=1000)
        self._now = 0.0
        self.directory.open_session(_ENGINE, "engine", "engine", 0.0, host="h")
        self.directory.open_session(_LENDER, "lender", "lender", 0.0, host="h")
        slabs = list(self._slabs(blocks))
        info = SegmentInfo(
            uuid=_LENDER, kind="host", host="h", device="host", broker="/nowhere", owner=_LENDER, slabs=tuple(slabs)
        )
        inventory = [SlabInventory(slab.index, bytes(HEADER_BYTES), b"") for slab in slabs]
        self._ask(Mount(info, inventory, GateReport(fence=2)), _LENDER)

    @staticmethod
    def _slabs(blocks: int) -> Iterator[SlabInfo]:
        for index, first in enumerate(range(0, blocks, _SLOTS)):
            yield SlabInfo(index, slab_bytes_for(ALIGNMENT, min(_SLOTS, blocks - first)))

    def request(self, now: float, keys: Sequence[bytes]) -> int:
        """Play one prompt: lease what is there, store what is not behind it; number of leading blocks that were there."""
        self._advance(now)
        found: PackedReply = self._ask(Acquire(keys))
        reply = found.unpack()
        hits = len(reply.locations)
        missing = list(keys[hits:])
        if missing:
            request = PutRequest(
                keys=missing,
                namespace=_NAMESPACE,
                parent=keys[hits - 1] if hits else b"",
                first_index=hits,
                tokens=[1] * len(missing),
                slot_bytes=ALIGNMENT,
            )
            grants = self._ask(PutStart(request))
            tickets = [
                Ticket(key, 0, grant.location.generation)
                for key, grant in zip(missing, grants, strict=True)
                if grant.location is not None
            ]
            self._ask(PutEnd(tickets))
        if reply.lease:
            self._ask(Release(reply.lease))
        self.directory.take_instructions()
        return hits

    def _advance(self, now: float) -> None:
        """Let the trace's clock go on, with the heartbeats that both clients send."""
        step = self.directory.next_deadline() or now
        while self._now < now:
            self._now = min(now, max(step - 1.0, self._now + 1.0))
            self.directory.heartbeat(_ENGINE, self._now)
            self.directory.heartbeat(_LENDER, self._now)
            self.directory.tick(self._now)
            step = self.directory.next_deadline() or now

    def _ask(self, verb: Verb[Any], client: bytes = _ENGINE) -> Any:
        answer = self.directory.handle(client, verb, self._now)
        return answer.finish() if isinstance(answer, Job) else answer


def replay(trace: Trace, config: ManagerConfig, blocks: int) -> Replayed:
    """Play a whole trace, one request after the other. Deterministic."""
    pool = Replay(config, blocks)
    asked = hits = 0
    for request in trace.requests:
        asked += len(request.keys)
        hits += pool.request(request.time, request.keys)
    counters = pool.directory.stats(trace.requests[-1].time).counters
    stored = counters["stored"]
    return Replayed(asked, hits, stored, counters["evictions"], asked - hits - stored)


def bench_trace(
    traces: Sequence[Trace],
    capacities: Sequence[str],
    policies: Sequence[TracePolicy],
    token_bytes: int,
    progress: Callable[[str], None],
    command: str,
) -> Report:
    """Replay every trace at every capacity with every policy, plain LRU first. Blocks: seconds to a minute for each."""
    report = Report(title="Hit ratios of the directory over traces", command=command, columns=COLUMNS)
    chosen = [policy_of(BASELINE), *(policy for policy in policies if policy.name != BASELINE)]
    for trace in traces:
        asked, unique = trace.blocks, trace.unique
        report.notes.append(
            f"{trace.name}: {len(trace.requests):,} requests, {asked:,} blocks of {trace.block_tokens} tokens, {unique:,} "
            f"different ({ByteSize(unique * trace.block_tokens * token_bytes) / 2**30:,.0f} GiB at {token_bytes:,} bytes a "
            f"token); without a limit {1 - unique / asked:.4f} are hits"
        )
        for capacity in capacities:
            blocks, baseline = capacity_of(capacity, trace, token_bytes), 0.0
            for policy in chosen:
                progress(f"{trace.name}, {capacity}, {policy.name}")
                began = time.process_time()
                found = replay(trace, policy.config, blocks)
                ratio = found.hits / found.asked
                baseline = baseline or ratio
                report.rows.append(
                    {
                        "trace": trace.name,
                        "capacity": capacity,
                        "blocks": blocks,
                        "policy": policy.name,
                        "hit_ratio": ratio,
                        "of_lru": ratio / baseline if baseline else None,
                        "stored": found.stored,
                        "evictions": found.evictions,
                        "not_stored": found.not_stored,
                        "cpu_seconds": time.process_time() - began,
                    }
                )
    report.notes.append(
        "hit ratio: leading blocks of each prompt that are there when it comes, over all blocks of all prompts; requests one "
        "after the other; what is there is touched from head to tail and leased while the rest is stored, which is when blocks "
        "are evicted. Answers are not stored, as they are not in the traces. Depends on no machine"
    )
    return report
