"""What the tests of segments and of removal share."""

from __future__ import annotations

from directory_world import SLAB_BYTES, VARIANTS, World
from driven import Driven

from vcache.config import ManagerConfig
from vcache.segment.slots import (
    HEADER_BYTES,
    SegmentInfo,
    SlabHeader,
    SlabInfo,
    SlabInventory,
    SlotHeader,
)

ONE, TWO, BIG = VARIANTS
ME = b"m" * 16


def gauges(world: World) -> dict[str, int]:
    return world.directory.stats(world.now).gauges


def store(world: World, variant, prompt: int, count: int, start: int = 0, shard: int = 0, writer: int = 0, **options) -> None:
    world.put(world.clients[writer], variant, prompt, start, count, shard, **options)
    assert all(world.finish(world.clients[writer], list(world.clients[writer].flights)))


def hits(world: World, variant, prompt: int, count: int) -> int:
    return world.directory.lookup(world.clients[1].id, variant.keys(prompt, count), world.now)


def lone(slabs: int = 1, nbytes: int = SLAB_BYTES, uuid: bytes = b"u" * 16, **change) -> tuple[Driven, SegmentInfo]:
    directory = Driven(ManagerConfig(), epoch=1000)
    directory.open_session(ME, "m", "lender", 0.0)
    fields = {"kind": "host", "host": "h", "device": "host", "broker": "", "owner": ME} | change
    return directory, SegmentInfo(uuid=uuid, slabs=tuple(SlabInfo(i, nbytes) for i in range(slabs)), **fields)


def header(key: bytes = b"k" * 16, generation: int = 20, **change) -> SlotHeader:
    fields = {"shard": 0, "num_shards": 1, "namespace": b"n" * 16, "payload_bytes": 8, "tokens": 4, "chunk_index": 0} | change
    return SlotHeader(generation=generation, key=key, **fields)


def slab_of(
    *headers: SlotHeader | bytes, slab: int = 0, slots: int = 4, slot_bytes: int = 256, formatted: int = 10
) -> SlabInventory:
    raw = b"".join(h if isinstance(h, bytes) else h.pack() for h in headers)
    return SlabInventory(slab, SlabHeader(formatted, slot_bytes, slots).pack(), raw.ljust(slots * HEADER_BYTES, b"\0"))
