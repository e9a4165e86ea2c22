"""A paged KV cache as inference engines have one, and the layer through which a transformers model uses it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..spec import DTYPE_BYTES, KVCacheSpec

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPE_BYTES}


class PagedMemory:
    """Blocks of KV for one sequence, one tensor `[2, blocks, block_size, heads, head_size]` per layer, in a shuffled order.

    Every element starts as NaN: what was neither computed nor retrieved cannot pass for KV, it would make every later number
    NaN.
    """

    def __init__(self, spec: KVCacheSpec, capacity: int, block_size: int, *, device: str = "cpu", seed: int = 0) -> None:
        """Room for `capacity` tokens. `seed` decides which blocks they get."""
        blocks = -(-capacity // block_size)
        shape = (2, blocks, block_size, spec.num_kv_heads, spec.head_size)
        dtype = TORCH_DTYPES[spec.dtype]
        self.capacity = capacity
        self.tensors = [torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(spec.num_layers)]
        table = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
        position = torch.arange(capacity)
        rows = table[position // block_size] * block_size + position % block_size
        self.slot_mapping = rows.to(device)
        """int64 `[capacity]`: `block * block_size + position` of each token, on the tensors' device."""

    def cache(self, present: int) -> Cache:
        """For a model's `past_key_values`: tokens `[0, present)` are there already, the next ones are written after them."""
        return Cache(layers=[PagedLayer(tensor, self.slot_mapping, present) for tensor in self.tensors])


class PagedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """One layer's KV in paged memory. Mutates the tensor it was given."""

    def __init__(self, tensor: torch.Tensor, slot_mapping: torch.Tensor, present: int) -> None:
        super().__init__()
        self._planes = tensor.flatten(1, 2)  # [2, blocks * block_size, heads, head_size], a view
        self._slot_mapping = slot_mapping
        self._present = present
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values `[1, heads, new, head_size]`; return all so far, `[1, heads, present, head_size]`."""
        end = self._present + key_states.shape[-2]
        rows = self._slot_mapping[self._present : end]
        for plane, states in zip(self._planes, (key_states, value_states), strict=True):
            plane.index_copy_(0, rows, states[0].transpose(0, 1))
        self._present = end
        used = self._slot_mapping[:end]
        keys, values = (plane.index_select(0, used).transpose(0, 1).unsqueeze(0) for plane in self._planes)
        return keys, values

    def get_seq_length(self) -> int:
        return self._present
