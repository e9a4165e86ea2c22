"""Paged caches, slot mappings and slots for measurements below the manager."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..errors import SegmentError
from ..keys import DIGEST_BYTES
from ..paged.layout import PagedCache
from ..paged.mover import SlotTransfer
from ..segment.mapping import PinnedSlot
from ..segment.slots import SlabHeader, SlotHeader, slab_bytes_for, slab_geometry
from ..spec import KVCacheSpec

if TYPE_CHECKING:
    import torch

    from ..segment.backing import MappedSlab

CHUNK = 256
WRITER = b"bench-writer----"
LLAMA_8B = KVCacheSpec(model="bench/8b", dtype="bfloat16", num_layers=32, num_kv_heads=8, head_size=128)
"""32 layers, 8 KV heads of 128, bf16: 64 regions of 2 KiB rows, 128 KiB a token, 32 MiB a chunk."""


class CacheArena:
    """Memory for a paged cache of up to `tokens` tokens, looked at with any block size. Random bytes."""

    def __init__(self, spec: KVCacheSpec, tokens: int, device: torch.device) -> None:
        import torch

        self.spec = spec
        self.tokens = tokens
        self.device = device
        dtype = getattr(torch, spec.dtype)
        size = 2 * tokens * spec.row_bytes
        self._layers = [torch.empty(size, dtype=torch.uint8, device=device).view(dtype) for _ in range(spec.num_layers)]
        self.fill(range(spec.num_layers))

    def tensors(self, block_size: int) -> list[torch.Tensor]:
        """One `[2, blocks, block_size, heads, head_size]` per layer, over the same memory each time."""
        heads, size = self.spec.num_kv_heads, self.spec.head_size
        return [layer.view(2, self.tokens // block_size, block_size, heads, size) for layer in self._layers]

    def cache(self, block_size: int) -> PagedCache:
        return PagedCache.bind(self.tensors(block_size), self.spec, layout="2BNHD")

    def fill(self, layers: Iterable[int]) -> None:
        """Random bytes in these layers."""
        import torch

        for layer in layers:
            self._layers[layer].view(torch.int64).random_()

    def clear(self, layers: Iterable[int]) -> None:
        """Zeros in these layers."""
        for layer in layers:
            self._layers[layer].zero_()

    def rows(self, mapping: torch.Tensor, layer: int) -> torch.Tensor:
        """Bytes of the tokens at `mapping`, K and V of one layer: `[2, tokens, row_bytes]`."""
        import torch

        return self._layers[layer].view(torch.uint8).view(2, self.tokens, self.spec.row_bytes)[:, mapping]


def block_mapping(tokens: int, block_size: int, total: int, device: torch.device, *, seed: int = 0) -> torch.Tensor:
    """Slots of `tokens` tokens in whole blocks, the blocks in random order: what a serving engine has. int64 on `device`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(total // block_size, generator=generator)[: -(-tokens // block_size)]
    slots = blocks[:, None] * block_size + torch.arange(block_size)
    return slots.flatten()[:tokens].to(device)


def random_mapping(tokens: int, total: int, device: torch.device, *, seed: int = 0) -> torch.Tensor:
    """Slots of `tokens` tokens, every one anywhere. int64 on `device`."""
    import torch

    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:tokens].to(device)


def slab_size(spec: KVCacheSpec, slots: int) -> int:
    """Bytes of a slab with room for `slots` full chunks."""
    return slab_bytes_for(spec.payload_bytes(CHUNK), slots)


class Slots:
    """Slots of full chunks over several slabs, and the transfers that write and read a prompt there."""

    def __init__(self, spec: KVCacheSpec, slabs: Sequence[MappedSlab], *, format_generation: int = 1) -> None:
        """`format_generation`: above that of slots of another size that these slabs held before."""
        self.spec = spec
        self._namespace = spec.namespace(CHUNK)
        self._slots: list[tuple[PinnedSlot, bytes]] = []
        for slab in slabs:
            geometry = slab_geometry(slab.nbytes, spec.payload_bytes(CHUNK))
            header = SlabHeader(format_generation, geometry.slot_bytes, geometry.slots).pack()
            for index in range(geometry.slots):
                slot = PinnedSlot(slab, geometry.header_offset(index), geometry.payload_offset(index))
                self._slots.append((slot, header))

    def __len__(self) -> int:
        return len(self._slots)

    def transfers(self, tokens: int, generation: int, *, first: int = 0) -> list[SlotTransfer]:
        """Chunks of a prompt of `tokens` tokens, the last one perhaps partial, in slots from number `first` on. A store needs
        a higher even `generation` each time, a load the one that was stored."""
        chunks = range(0, tokens, CHUNK)
        if first + len(chunks) > len(self._slots):
            raise SegmentError(f"{len(chunks)} chunks from slot {first} on do not fit into {len(self._slots)} slots")
        return [self._transfer(first + i, start, min(CHUNK, tokens - start), generation) for i, start in enumerate(chunks)]

    def _transfer(self, number: int, start: int, tokens: int, generation: int) -> SlotTransfer:
        slot, slab_header = self._slots[number]
        key = number.to_bytes(DIGEST_BYTES, "little")
        nbytes = self.spec.payload_bytes(tokens)
        header = SlotHeader(0, 1, generation, key, self._namespace, nbytes, tokens, start // CHUNK)
        return SlotTransfer(slot, header, start, 0, slab_header)
