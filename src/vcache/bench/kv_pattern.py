"""KV whose every byte follows from (prompt, token, layer, element): a process can check what another one stored.

Independent of the cache's layout: written and compared through the logical axes of its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import LayoutError
from ..spec import KVCacheSpec

if TYPE_CHECKING:
    import torch

LAYOUTS = ("2BNHD", "B2NHD", "2BHND", "B2HND", "BHNC", "BNHC", "BNC", "B1NC")


def make_tensors(
    spec: KVCacheSpec, layout: str, blocks: int, block_size: int, device: torch.device, *, pad: int = 0
) -> list[torch.Tensor]:
    """One tensor per layer in that layout, bytes 0xEE. `pad`: bytes between two blocks that belong to nobody, a multiple of the
    element size; only for layouts that begin with B."""
    import torch

    heads, size = spec.num_kv_heads, spec.head_size
    axes = {"2": 2, "B": blocks, "N": block_size, "H": heads, "D": size, "1": 1}
    axes["C"] = size if spec.row_format == "mla" else 2 * size
    shape = [axes[axis] for axis in layout]
    dtype = getattr(torch, spec.dtype)
    tensors = []
    for _ in range(spec.num_layers):
        if pad:
            if layout[0] != "B":
                raise LayoutError(f"layout {layout}: padding between blocks needs B as the first axis")
            inner = int(torch.Size(shape[1:]).numel())
            step = inner + pad // spec.element_bytes
            raw = torch.full((blocks * step * spec.element_bytes,), 0xEE, dtype=torch.uint8, device=device).view(dtype)
            whole = raw.view(blocks, step)[:, :inner]
            tensors.append(whole.view(blocks, *shape[1:]))
        else:
            nbytes = int(torch.Size(shape).numel()) * spec.element_bytes
            tensors.append(torch.full((nbytes,), 0xEE, dtype=torch.uint8, device=device).view(dtype).view(shape))
    return tensors


def write(
    tensors: Sequence[torch.Tensor], layout: str, spec: KVCacheSpec, slots: torch.Tensor, prompt: int, *, first: int = 0
) -> None:
    """Put tokens `first`, `first + 1`, ... of the prompt into `slots` (int64, on the tensors' device)."""
    for layer, tensor in enumerate(tensors):
        content = _content(spec, len(slots), layer, prompt, first, tensor.device)
        for place, part in _places(tensor, layout, spec, slots, content):
            view, index = place
            view[index] = part


def matches(
    tensors: Sequence[torch.Tensor], layout: str, spec: KVCacheSpec, slots: torch.Tensor, prompt: int, *, first: int = 0
) -> torch.Tensor:
    """Per slot, whether it holds exactly that token in all layers: bool CPU tensor. Blocks."""
    import torch

    good = torch.ones(len(slots), dtype=torch.bool, device=slots.device)
    for layer, tensor in enumerate(tensors):
        content = _content(spec, len(slots), layer, prompt, first, tensor.device)
        for (view, index), part in _places(tensor, layout, spec, slots, content):
            good &= (view[index] == part).flatten(1).all(1)
    return good.cpu()


def _content(spec: KVCacheSpec, tokens: int, layer: int, prompt: int, first: int, device: torch.device) -> torch.Tensor:
    """`[tokens, heads, halves * head bytes]`, uint8: K then V of each head (MLA: one latent)."""
    import torch

    head = spec.head_size * spec.element_bytes * (1 if spec.row_format == "mla" else 2)
    width = spec.num_kv_heads * head
    token = torch.arange(first, first + tokens, device=device)[:, None]
    place = torch.arange(width, device=device)[None, :]
    mixed = token * 0x9E3779B1 + place * 0x85EBCA6B + (layer * 0xC2B2AE35 + prompt * 0x27D4EB2F + 0x165667B1)
    mixed = ((mixed & 0xFFFFFFFF) ^ ((mixed & 0xFFFFFFFF) >> 15)) * 0x2C1B3C6D
    mixed = (mixed & 0xFFFFFFFF) >> 13
    return (mixed & 0xFF).to(torch.uint8).view(tokens, spec.num_kv_heads, head)


Place = tuple["torch.Tensor", tuple["torch.Tensor | int | slice", ...]]


def _places(
    tensor: torch.Tensor, layout: str, spec: KVCacheSpec, slots: torch.Tensor, content: torch.Tensor
) -> list[tuple[Place, torch.Tensor]]:
    """(where, what) so that `tensor[where] = what` writes the content. Views of bytes."""
    import torch

    block_size = tensor.shape[layout.index("N")]
    block, position = slots // block_size, slots % block_size
    everything = slice(None)
    view = tensor.view(torch.uint8)
    if layout == "BNC":
        return [((view, (block, position)), content[:, 0])]
    if layout == "B1NC":
        return [((view, (block, 0, position)), content[:, 0])]
    if layout == "BNHC":
        return [((view, (block, position)), content)]
    if layout == "BHNC":
        return [((view, (block, everything, position)), content)]
    half = content.shape[2] // 2
    planes = (content[:, :, :half], content[:, :, half:])
    index: dict[str, tuple[torch.Tensor | int | slice, ...]] = {
        "2BNHD": (block, position),
        "2BHND": (block, everything, position),
        "B2NHD": (block, position),
        "B2HND": (block, everything, position),
    }
    if layout not in index:
        raise LayoutError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    axis = layout.index("2")
    return [((view.select(axis, plane), index[layout]), part) for plane, part in enumerate(planes)]
