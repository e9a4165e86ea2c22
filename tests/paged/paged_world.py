"""A paged KV cache of any layout beside a slab, and a naive token-by-token model of what movers must do."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vcache.paged.layout import PagedCache
from vcache.paged.mover import SlotTransfer
from vcache.segment.mapping import MappedSlab, PinnedSlot
from vcache.segment.slots import SlabHeader, SlotHeader, slab_bytes_for, slab_geometry
from vcache.spec import KVCacheSpec

WRITER = bytes(range(16))
NAMESPACE = b"N" * 16
DTYPES = ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "uint8", "int8")
# (layout name, order in memory; L is the layer: where it comes first, every layer has memory of its own)
ORDERS = (
    ("2BNHD", "L2BNHD"),
    ("2BNHD", "L2BHND"),
    ("2BNHD", "B2LNHD"),
    ("B2NHD", "LB2NHD"),
    ("B2NHD", "LB2HND"),
    ("B2NHD", "BL2NHD"),
    ("BHNC", "LBNHC"),
    ("BHNC", "LBHNC"),
    ("BHNC", "BLNHC"),
    ("BHNC", "BHLNC"),
    ("2BHND", "L2BHND"),
    ("B2HND", "LB2HND"),
    ("BNHC", "LBNHC"),
)
MLA_ORDERS = (("BNC", "LBNC"), ("BNC", "BLNC"), ("B1NC", "LB1NC"))


def make_spec(
    dtype: str = "bfloat16", layers: int = 2, heads: int = 2, head_size: int = 8, row_format: Any = "planes"
) -> KVCacheSpec:
    heads = 1 if row_format == "mla" else heads
    return KVCacheSpec(
        model="m", dtype=dtype, num_layers=layers, num_kv_heads=heads, head_size=head_size, row_format=row_format
    )


def make_tensors(
    spec: KVCacheSpec,
    layout: str,
    order: str,
    num_blocks: int,
    block_size: int,
    *,
    pad: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """Random bytes. `order`: axes in memory from outermost to innermost; `pad`: unused elements behind each block."""
    content = spec.head_size * (1 if spec.row_format == "mla" else 2)
    sizes = {
        "L": spec.num_layers,
        "2": 2,
        "B": num_blocks,
        "N": block_size,
        "H": spec.num_kv_heads,
        "D": spec.head_size,
        "C": content,
        "1": 1,
    }
    strides, extent = {}, 1
    for axis in reversed(order):
        if axis == "B":
            extent += pad
        strides[axis], extent = extent, extent * sizes[axis]
    random = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (extent * spec.element_bytes,), dtype=torch.uint8, generator=random).to(device)
    flat = raw.view(getattr(torch, spec.dtype))
    shape, steps = [sizes[axis] for axis in layout], [strides[axis] for axis in layout]
    return [flat.as_strided(shape, steps, layer * strides["L"]) for layer in range(spec.num_layers)]


class Model:
    """Reads and writes the tensors token by token, head by head, through their logical axes."""

    def __init__(self, spec: KVCacheSpec, layout: str, tensors: list[torch.Tensor]) -> None:
        self.spec, self.layout = spec, layout
        self.arrays = [bytes_of(tensor) for tensor in tensors]
        self.block_size = tensors[0].shape[layout.index("N")]

    def row(self, region: int, slot: int) -> list[tuple[int, tuple[Any, ...]]]:
        """(layer, index) of the parts of a row, in payload order."""
        spec, width = self.spec, self.spec.head_size
        planes = spec.row_format == "planes"
        layer = region // 2 if planes else region
        parts = [(h, region % 2) for h in range(spec.num_kv_heads)]
        if spec.row_format == "fused":
            parts = [(h, kv) for h in range(spec.num_kv_heads) for kv in (0, 1)]
        if spec.row_format == "mla":
            parts = [(0, 0)]
        found = []
        for head, plane in parts:
            at = {
                "2": plane,
                "B": slot // self.block_size,
                "N": slot % self.block_size,
                "H": head,
                "1": 0,
                "D": slice(None),
                "C": slice(plane * width, (plane + 1) * width),
            }
            found.append((layer, tuple(at[axis] for axis in self.layout)))
        return found

    def gather(self, slots: list[int]) -> bytes:
        """The payload of these slots."""
        return b"".join(
            self.arrays[layer][index].tobytes()
            for region in range(self.spec.regions)
            for slot in slots
            for layer, index in self.row(region, slot)
        )

    def scatter(self, slots: list[int], payload: bytes, tokens: int, skip: int) -> None:
        """Write payload tokens `[skip, tokens)` to these slots."""
        width = self.spec.row_bytes
        for region in range(self.spec.regions):
            for token, slot in enumerate(slots, skip):
                row = payload[(region * tokens + token) * width :][:width]
                parts = self.row(region, slot)
                size = width // len(parts)
                for number, (layer, index) in enumerate(parts):
                    target = self.arrays[layer]
                    target[index] = np.frombuffer(row[number * size : (number + 1) * size], target.dtype)

    def equals(self, tensors: list[torch.Tensor]) -> bool:
        return all(np.array_equal(mine, bytes_of(tensor)) for mine, tensor in zip(self.arrays, tensors, strict=True))


def bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A copy as integers, so that NaNs compare."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.detach().cpu().clone().contiguous().view(integer).numpy()


def host_slab(nbytes: int) -> MappedSlab:
    memory = mmap.mmap(-1, nbytes)
    first = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(first)
    return MappedSlab(
        "host", "host", nbytes, address, device_address=address, buffer=memoryview(memory), resource=(memory, first)
    )


@dataclass
class Slots:
    """A host slab formatted for chunks of `spec`, and headers that only grow."""

    spec: KVCacheSpec
    tokens: int
    slots: int
    slab: MappedSlab
    generation: int = 1000

    @classmethod
    def make(cls, spec: KVCacheSpec, tokens: int, slots: int = 4, slab: MappedSlab | None = None) -> Slots:
        return cls(spec, tokens, slots, slab or host_slab(cls.nbytes(spec, tokens, slots)))

    @staticmethod
    def nbytes(spec: KVCacheSpec, tokens: int, slots: int) -> int:
        return slab_bytes_for(spec.payload_bytes(tokens), slots)

    @property
    def slab_header(self) -> bytes:
        return SlabHeader(998, self.spec.payload_bytes(self.tokens), self.slots).pack()

    def pinned(self, slot: int) -> PinnedSlot:
        geometry = slab_geometry(self.slab.nbytes, self.spec.payload_bytes(self.tokens))
        return PinnedSlot(self.slab, geometry.header_offset(slot), geometry.payload_offset(slot))

    def transfer(self, slot: int, tokens: int, start: int, skip: int = 0) -> SlotTransfer:
        """A new ticket for `slot`."""
        self.generation += 2
        header = SlotHeader(0, 1, self.generation, bytes([slot]) * 16, NAMESPACE, self.spec.payload_bytes(tokens), tokens, slot)
        return SlotTransfer(self.pinned(slot), header, start, skip, self.slab_header)

    def read(self, offset: int, nbytes: int) -> bytes:
        assert self.slab.buffer is not None
        return bytes(self.slab.buffer[offset : offset + nbytes])

    def write(self, offset: int, data: bytes) -> None:
        assert self.slab.buffer is not None
        self.slab.buffer[offset : offset + len(data)] = data

    def header_at(self, slot: int) -> bytes:
        return self.read(self.pinned(slot).header_offset, 64)

    def payload_at(self, slot: int, tokens: int) -> bytes:
        return self.read(self.pinned(slot).payload_offset, self.spec.payload_bytes(tokens))


@dataclass(frozen=True)
class Case:
    """One round trip: chunks of `tokens` tokens out of a cache of one layout, into one of another."""

    spec: KVCacheSpec
    source: tuple[str, str]
    target: tuple[str, str]
    block_size: int
    target_block_size: int
    tokens: tuple[int, ...]
    """Tokens of each chunk."""
    skip: int
    """Tokens of the first chunk that are not loaded."""
    offset: int
    """Entries of the slot mapping before the first chunk."""
    pad: int
    mapping: str
    """consecutive | blocks | random"""
    seed: int

    @property
    def entries(self) -> int:
        return self.offset + sum(self.tokens)

    def blocks(self, block_size: int) -> int:
        return -(-self.entries // block_size) + 3

    def slot_mapping(self, block_size: int, seed: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        random, count, blocks = torch.Generator().manual_seed(seed), self.entries, self.blocks(block_size)
        if self.mapping == "random":
            return torch.randperm(blocks * block_size, generator=random)[:count].to(dtype)
        if self.mapping == "blocks":
            order = torch.randperm(blocks, generator=random)
            return (order[:, None] * block_size + torch.arange(block_size)).flatten()[:count].to(dtype)
        first = int(torch.randint(0, blocks * block_size - count + 1, (1,), generator=random))
        return torch.arange(first, first + count).to(dtype)


def round_trip(
    case: Case, mover: Any, slots: Slots | None = None, device: str = "cpu", dtype: torch.dtype = torch.int64
) -> None:
    """Store with the source layout, load with the target layout; compare headers, payloads and every byte of both caches
    with the naive model."""
    spec = case.spec
    pad = case.pad
    source = make_tensors(
        spec, *case.source, case.blocks(case.block_size), case.block_size, pad=pad, seed=case.seed, device=device
    )
    target = make_tensors(
        spec,
        *case.target,
        case.blocks(case.target_block_size),
        case.target_block_size,
        pad=pad,
        seed=case.seed + 1,
        device=device,
    )
    before, after = Model(spec, case.source[0], source), Model(spec, case.target[0], target)
    slots = slots or Slots.make(spec, max(case.tokens), len(case.tokens))
    starts = [case.offset + sum(case.tokens[:number]) for number in range(len(case.tokens))]
    transfers = [
        slots.transfer(number, tokens, start) for number, (tokens, start) in enumerate(zip(case.tokens, starts, strict=True))
    ]

    reading = case.slot_mapping(case.block_size, case.seed, dtype)
    cache = PagedCache.bind(source, spec, layout=case.source[0], block_size=case.block_size)
    stored = mover.store(cache, reading.to(device), transfers, WRITER)
    assert stored.wait(30)
    assert stored.done()
    assert stored.verified() == [True] * len(transfers)
    assert before.equals(source)
    for transfer in transfers:
        number, tokens = transfer.header.chunk_index, transfer.header.tokens
        assert slots.header_at(number) == transfer.header.pack()
        assert slots.payload_at(number, tokens) == before.gather(reading[transfer.start : transfer.start + tokens].tolist())
    assert slots.read(0, 64) == slots.slab_header

    writing = case.slot_mapping(case.target_block_size, case.seed + 1, dtype)
    skip = min(case.skip, case.tokens[0] - 1)
    loads = [transfers[0]._replace(skip=skip, start=transfers[0].start + skip), *transfers[1:]]
    for load in loads:
        payload = slots.payload_at(load.header.chunk_index, load.header.tokens)
        rows = writing[load.start : load.start + load.header.tokens - load.skip].tolist()
        after.scatter(rows, payload, load.header.tokens, load.skip)
    cache = PagedCache.bind(target, spec, layout=case.target[0], block_size=case.target_block_size)
    loaded = mover.load(cache, writing.to(device), loads)
    assert loaded.wait(30)
    assert loaded.verified() == [True] * len(loads)
    assert after.equals(target)
