"""Two hosts in one process: an engine that lends and stores; a pool that reads its slots through a made-up transfer engine."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from support.paged import Paged, content, spec_for

from vcache import VCacheConfig, VCacheEngine
from vcache.cache.pool import ChunkPool
from vcache.cache.remote_reads import RemoteReader
from vcache.keys import Chunk
from vcache.lender.lender import Lender
from vcache.metrics import EngineMetrics
from vcache.paged.layout import PagedCache
from vcache.paged.mover import Rows, Target
from vcache.paged.select import mover_for
from vcache.segment.host import HostBacking
from vcache.segment.mapping import SegmentMap

CHUNK, LAYOUT, BLOCKS, BLOCK_SIZE = 16, "2BNHD", 32, 8
SPEC = spec_for(LAYOUT)
HERE, THERE = "reader's host", "lender's host"

Reading = Callable[[list[int], list[int], list[int]], int]


def copy(targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> int:
    for target, source, size in zip(targets, sources, sizes, strict=True):
        ctypes.memmove(target, source, size)
    return 0


class FakeEngine:
    """Copies inside this process. `behave(endpoint, number of the call, targets, sources, sizes)` may do something else."""

    supports_cuda = False

    def __init__(self, endpoint: str = "fake:1", behave: Callable[..., int] | None = None) -> None:
        self.endpoint = endpoint
        self.behave = behave
        self.retired: list[object] = []
        self.registered: dict[int, int] = {}
        self.calls: list[tuple[str, list[int], list[int]]] = []
        self._lock = threading.Lock()

    def register(self, address: int, nbytes: int) -> bool:
        self.registered[address] = nbytes
        return True

    def unregister(self, address: int) -> None:
        self.registered.pop(address, None)

    def read(self, endpoint: str, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> int:
        for target, size in zip(targets, sizes, strict=True):
            if not any(start <= target and target + size <= start + nbytes for start, nbytes in self.registered.copy().items()):
                return -3  # what RDMA would say
        with self._lock:
            self.calls.append((endpoint, list(targets), list(sizes)))
            number = len(self.calls)
        if self.behave is not None:
            return self.behave(endpoint, number, targets, sources, sizes)
        return copy(targets, sources, sizes)


class World:
    """`stored(n)` puts a prompt of `n` chunks into the pool; `load` reads it from the other host."""

    def __init__(self, *, deadline: float = 5.0, limit: int | None = None, lenders: int = 1, storage: str = "none") -> None:
        segment = {"kind": "host", "size": "512KiB", "slab_size": "128KiB"}
        config = VCacheConfig.from_env(
            {}, segment=segment, cache={"chunk_size": CHUNK, "placement": "spread"}, storage={"kind": storage}
        )
        self.engine = VCacheEngine(config, SPEC, device="cpu")
        manager = self.engine.manager
        first = self.engine.cache.lender
        assert first is not None
        self.lenders = [first]
        for _ in range(lenders - 1):
            lender = Lender(manager, HostBacking(), config.segment)
            assert lender.wait_mounted(5)
            self.engine.cache.segments.add_local(lender.uuid, lender.slab, lender.backing)
            self.lenders.append(lender)
        for info in manager.segments():
            self.engine.cache.segments.update(info)
        self.engines: list[FakeEngine] = []
        self.behave: Callable[..., int] | None = None
        self.segments = SegmentMap(manager.client_id, HERE, {"host": lambda device: HostBacking()})
        self.metrics = EngineMetrics()
        size = SPEC.payload_bytes(CHUNK)
        self.remote = RemoteReader(size, self.make_engine, self.alive, deadline=deadline, limit=limit)
        self.pool = ChunkPool(manager, self.segments, SPEC, CHUNK, self.metrics, remote=self.remote)
        for number in range(lenders):
            self.show(number)

    def make_engine(self, endpoint: str) -> FakeEngine:
        self.engines.append(FakeEngine(endpoint, lambda *call: self.behave(*call) if self.behave else copy(*call[2:])))
        return self.engines[-1]

    def alive(self) -> set[bytes]:
        return {info.uuid for info in self.segments.segments()}

    def show(self, lender: int, *, host: str = THERE, **changes: Any) -> None:
        """Announce a lender's segment to the reader, as one of another host unless `host` says otherwise."""
        one = self.lenders[lender]
        (info,) = [info for info in self.engine.manager.segments() if info.uuid == one.uuid]
        slabs = tuple(msgspec.structs.replace(slab, address=one.slab(slab.index).address) for slab in info.slabs)  # type: ignore[union-attr]
        changes = {"host": host, "endpoint": f"fake:{lender}", "slabs": slabs, **changes}
        if host == HERE:
            self.segments.add_local(one.uuid, one.slab, one.backing)
        self.segments.update(msgspec.structs.replace(info, **changes))

    def stored(self, chunks: int, seed: int = 1) -> list[int]:
        tokens = [seed * 10000 + i for i in range(chunks * CHUNK)]
        self.store(tokens)
        return tokens

    def store(self, tokens: list[int]) -> None:
        paged, slots = Paged.zeros(SPEC, LAYOUT, BLOCKS, BLOCK_SIZE), list(range(len(tokens)))
        paged.write(slots, content(SPEC, tokens))
        self.engine.store(tokens, kvcaches=paged.tensors, slot_mapping=torch.tensor(slots))

    def chunks(self, tokens: list[int]) -> list[Chunk]:
        keys = self.engine.chunk_keys(tokens)
        return [Chunk(key.digest, i, CHUNK, i * CHUNK) for i, key in enumerate(keys)]

    def load(self, tokens: list[int]) -> Loading:
        return self.load_chunks(self.chunks(tokens), len(tokens), tokens)

    def load_chunks(self, chunks: list[Chunk], rows: int, tokens: Sequence[int] = ()) -> Loading:
        lease = self.pool.acquire([chunk.digest for chunk in chunks])
        assert len(lease.locations) == len(chunks)
        paged = Paged.zeros(SPEC, LAYOUT, BLOCKS, BLOCK_SIZE)
        cache = PagedCache.bind(paged.tensors, SPEC)
        target = Target(cache, mover_for(cache, self.engine.config.transfer))
        return Loading(paged, list(tokens), self.pool.load(lease, chunks, Rows(target, torch.arange(rows))))

    def counter(self, name: str) -> int:
        found: int = self.metrics.snapshot()["counters"][name]
        return found

    def close(self) -> None:
        self.behave = None
        self.remote.close()
        self.segments.close()
        for lender in self.lenders[1:]:
            lender.close()
        self.engine.close()


class Loading:
    """A load under way, and the cache it fills."""

    def __init__(self, paged: Paged, tokens: list[int], transfer: Any) -> None:
        self.paged = paged
        self.tokens = tokens
        self.transfer = transfer

    def flags(self) -> list[bool]:
        """Waits; checks that the bytes of every chunk flagged True are right."""
        found: list[bool] = self.transfer.result()
        expected = content(SPEC, self.tokens)
        for index, ok in enumerate(found):
            place = slice(index * CHUNK, (index + 1) * CHUNK)
            if ok:
                got = self.paged.read(list(range(len(self.tokens)))[place])
                assert np.array_equal(got, expected[place]), f"chunk {index} has wrong bytes"
        return found
