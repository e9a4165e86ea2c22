"""What an `EngineProcess` can be asked to do: the methods of one object in that process."""

from __future__ import annotations

import os
import signal
from typing import Any, NamedTuple

import torch
from support.paged import Paged, content

from vcache import KVCacheSpec, VCacheConfig, VCacheEngine
from vcache.keys import Chunk
from vcache.paged.cpu_mover import CpuMover
from vcache.paged.mover import Rows


class SuicidalMover(CpuMover):
    """Stops or kills its own process after the odd header is written and before (or amid) the payload."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def store(self, cache: Any, slot_mapping: Any, transfers: Any, writer: bytes) -> Any:
        for transfer in transfers:
            slot, buffer = transfer.slot, transfer.slot.slab.buffer
            buffer[: len(transfer.slab_header)] = transfer.slab_header
            raw = transfer.header.writing(writer).pack()
            buffer[slot.header_offset : slot.header_offset + len(raw)] = raw
            half = transfer.header.payload_bytes // 2
            buffer[slot.payload_offset : slot.payload_offset + half] = b"\xee" * half
        os.kill(os.getpid(), self.number)
        return super().store(cache, slot_mapping, transfers, writer)


class Retrieved(NamedTuple):
    """What a retrieve said, and the bytes of all rows of the cache."""

    mask: list[bool]
    raw: bytes
    shape: tuple[int, ...]
    """`[slots, regions, row_bytes]`."""


class EngineWorker:
    def __init__(self, config: dict[str, Any], spec: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.spec = KVCacheSpec(**spec)
        self.engine = VCacheEngine(VCacheConfig.from_env({}, **config), self.spec, name=f"test-{os.getpid()}")
        self.held: list[Any] = []

    def store(
        self, layout: str, tokens: list[int], slots: list[int], blocks: int, block_size: int, skipped: int, offset: int
    ) -> None:
        paged = Paged.zeros(self.spec, layout, blocks, block_size)
        paged.write(slots[skipped - offset :], content(self.spec, tokens, start=skipped))
        self.engine.store(
            tokens, self._mask(tokens, skipped), kvcaches=paged.tensors, slot_mapping=torch.tensor(slots), offset=offset
        )

    def retrieve(
        self, layout: str, tokens: list[int], slots: list[int], blocks: int, block_size: int, skipped: int
    ) -> Retrieved:
        paged = Paged.zeros(self.spec, layout, blocks, block_size)
        mask = self.engine.retrieve(
            tokens, self._mask(tokens, skipped), kvcaches=paged.tensors, slot_mapping=torch.tensor(slots)
        )
        rows = paged.read(list(range(blocks * block_size)))
        return Retrieved(mask.tolist(), rows.tobytes(), rows.shape)

    def store_dying(self, number: int, layout: str, tokens: list[int], slots: list[int], blocks: int, block_size: int) -> None:
        """As `store`, but this process gets signal `number` between header and payload."""
        paged = Paged.zeros(self.spec, layout, blocks, block_size)
        target = self.engine.bind(paged.tensors)
        self.engine._targets[0] = target._replace(mover=SuicidalMover(number))
        paged.write(slots, content(self.spec, tokens))
        self.engine.store(tokens, kvcaches=paged.tensors, slot_mapping=torch.tensor(slots))

    def lookup(self, tokens: list[int]) -> int:
        return self.engine.lookup(tokens)

    def contains(self, tokens: list[int]) -> list[int]:
        return [self.engine.contains(key) for key in self.engine.chunk_keys(tokens)]

    def keys(self, tokens: list[int]) -> list[str]:
        return [str(key) for key in self.engine.chunk_keys(tokens)]

    def stats(self) -> dict[str, Any]:
        return self.engine.get_stats()

    def connected(self) -> int:
        return self.engine.manager.epoch

    def hold_lease(self, tokens: list[int]) -> int:
        """Lease the prompt's chunks and keep the lease; the number of locations."""
        digests = [key.digest for key in self.engine.chunk_keys(tokens)]
        self.held.append(self.engine.pool.acquire(digests))
        return len(self.held[-1].locations)

    def load_held(self, tokens: list[int]) -> list[bool]:
        """Read through the lease taken by `hold_lease`, whatever has happened since."""
        paged = Paged.zeros(self.spec, "2BNHD", 12, 8)
        target = self.engine.bind(paged.tensors)
        size = self.engine.config.cache.chunk_size
        chunks = [
            Chunk(key.digest, i, min(size, len(tokens) - i * size), i * size)
            for i, key in enumerate(self.engine.chunk_keys(tokens))
        ]
        return self.engine.pool.load(self.held[-1], chunks, Rows(target, torch.arange(len(tokens)))).result()

    def clear(self) -> int:
        return self.engine.manager.clear()

    def leases(self) -> int:
        return sum(session.leases for session in self.engine.manager.stats().sessions)

    def manager_stats(self) -> tuple[int, int, int]:
        """(free + used, processing, quarantined) slots over all segments."""
        segments = self.engine.manager.stats().segments
        return (
            sum(s.slots_free + s.slots_used for s in segments),
            sum(s.slots_processing for s in segments),
            sum(s.slots_quarantined for s in segments),
        )

    def close(self) -> None:
        self.engine.close()

    def stop_now(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _mask(self, tokens: list[int], skipped: int) -> list[bool] | None:
        return [i >= skipped for i in range(len(tokens))] if skipped else None
