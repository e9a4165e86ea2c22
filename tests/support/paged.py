"""Paged caches with known contents, for tests: build one in any layout, fill rows, read rows back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from vcache import KVCacheSpec

LAYOUTS = ("2BNHD", "B2NHD", "BHNC", "BNC", "2BNHD-hnd")
DTYPES = ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "uint8", "int8")


def spec_for(
    layout: str, dtype: str = "float32", *, layers: int = 3, heads: int = 2, head_size: int = 8, **more: object
) -> KVCacheSpec:
    row_format = {"BHNC": "fused", "BNC": "mla"}.get(layout, "planes")
    heads = 1 if row_format == "mla" else heads
    return KVCacheSpec(
        model="test", dtype=dtype, num_layers=layers, num_kv_heads=heads, head_size=head_size, row_format=row_format, **more
    )


@dataclass
class Paged:
    """One engine's paged cache. `rows(layer)` is what a token's bytes look like, `[slots, planes, bytes]` uint8."""

    spec: KVCacheSpec
    layout: str
    blocks: int
    block_size: int
    tensors: list[torch.Tensor]

    @classmethod
    def zeros(cls, spec: KVCacheSpec, layout: str, blocks: int, block_size: int) -> Paged:
        h, d, b, n = spec.num_kv_heads, spec.head_size, blocks, block_size
        dtype = getattr(torch, spec.dtype)

        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(int(np.prod(shape)) * spec.element_bytes, dtype=torch.uint8).view(dtype).reshape(shape)

        makers = {
            "2BNHD": lambda: empty(2, b, n, h, d),
            "B2NHD": lambda: empty(b, 2, n, h, d),
            "BHNC": lambda: empty(b, h, n, 2 * d),
            "BNC": lambda: empty(b, n, d),
            "2BNHD-hnd": lambda: empty(2, b, h, n, d).permute(0, 1, 3, 2, 4),
        }
        return cls(spec, layout, b, n, [makers[layout]() for _ in range(spec.num_layers)])

    def _planes(self, layer: int) -> list[torch.Tensor]:
        """Views `[B, N, ...]` whose `[block, position]` is one row, without their memory order mattering."""
        tensor = self.tensors[layer]
        if self.layout in ("2BNHD", "2BNHD-hnd"):
            return [tensor[0], tensor[1]]
        if self.layout == "B2NHD":
            return [tensor[:, 0], tensor[:, 1]]
        return [tensor.permute(0, 2, 1, 3)] if self.layout == "BHNC" else [tensor]

    def read(self, slots: list[int]) -> np.ndarray:
        """Bytes of these rows, `[tokens, regions, row_bytes]`."""
        index = torch.tensor(slots)
        rows = []
        for layer in range(self.spec.num_layers):
            for plane in self._planes(layer):
                picked = plane[index // self.block_size, index % self.block_size].contiguous()
                rows.append(picked.view(torch.uint8).reshape(len(slots), -1).numpy())
        return np.stack(rows, axis=1)

    def write(self, slots: list[int], data: np.ndarray) -> None:
        """Inverse of `read`."""
        index, region = torch.tensor(slots), 0
        dtype = getattr(torch, self.spec.dtype)
        for layer in range(self.spec.num_layers):
            for plane in self._planes(layer):
                raw = torch.from_numpy(np.ascontiguousarray(data[:, region])).view(dtype)
                plane[index // self.block_size, index % self.block_size] = raw.reshape(len(slots), *plane.shape[2:])
                region += 1


def content(spec: KVCacheSpec, tokens: list[int], *, start: int = 0) -> np.ndarray:
    """The KV that a (deterministic, causal) model computes for `tokens`: `[tokens - start, regions, row_bytes]` uint8.

    Every row depends on the whole prefix, on the region and on its index, so that any mix-up shows.
    """
    out = np.empty((len(tokens) - start, spec.regions, spec.row_bytes), dtype=np.uint8)
    state = hashlib.blake2b(digest_size=8)
    for position, token in enumerate(tokens):
        state.update(token.to_bytes(4, "little"))
        if position >= start:
            seed = int.from_bytes(state.digest(), "little")
            out[position - start] = np.random.Generator(np.random.Philox(seed)).integers(
                0, 256, (spec.regions, spec.row_bytes), dtype=np.uint8
            )
    return out
