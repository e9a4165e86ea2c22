"""`PagedCache`: where every token's bytes lie in an engine's paged KV cache, whatever the layout of its tensors.

Layout names spell the logical axes of one layer's tensor, in the order of its shape:

    2  K and V planes     B  blocks     N  tokens of a block     H  KV heads     D  head_size
    C  content: K then V of one head (2 * head_size), or the MLA latent (head_size)     1  the single head of MLA

Only the logical order is named. The order in memory (NHD or HND, a padded page, layers interleaved in one allocation) is read
from the strides. Recognised by shape: `2BNHD`, `B2NHD`, `BHNC`; for MLA `BNC`, `B1NC`. The others (`2BHND`, `B2HND`, `BNHC`)
must be asked for by name: their shapes cannot be told from the first when there are as many heads as tokens in a block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ArgumentError, LayoutError, SpecError
from ..spec import DTYPE_BYTES, KVCacheSpec

if TYPE_CHECKING:
    import torch

KNOWN_LAYOUTS = {"heads": ("2BNHD", "B2NHD", "BHNC"), "mla": ("BNC", "B1NC")}
"""Recognised by shape, for specs with K and V per head and for MLA."""
NAMED_LAYOUTS = {"heads": ("2BHND", "B2HND", "BNHC"), "mla": ()}
"""Understood only when `layout=` names them."""


class Region(NamedTuple):
    """Where the rows of one region lie; addresses and strides in bytes.

    The row of slot `s` consists of `pieces * halves` parts of `piece_bytes`; part `(p, h)` starts at
    `address + (s // block_size) * block_stride + (s % block_size) * token_stride + p * piece_stride + h * half_stride`.
    """

    address: int
    block_stride: int
    token_stride: int
    pieces: int
    piece_bytes: int
    piece_stride: int
    halves: int = 1
    """2 where K and V of one head lie apart but the row wants them side by side."""
    half_stride: int = 0

    @property
    def row_bytes(self) -> int:
        return self.pieces * self.halves * self.piece_bytes


@dataclass(frozen=True, eq=False)
class PagedCache:
    """An engine's KV tensors, understood. Immutable; keeps the tensors alive. Make one with `bind` and reuse it."""

    spec: KVCacheSpec
    layout: str
    names: tuple[str, ...]
    """One per layer: the mapping's keys, or "0", "1", ..."""
    tensors: tuple[torch.Tensor, ...]
    regions: tuple[Region, ...]
    """In payload order: layer by layer, K before V for row format 'planes'. All have equal pieces, piece_bytes and halves."""
    num_blocks: int
    block_size: int
    device: torch.device

    @classmethod
    def bind(
        cls,
        kvcaches: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
        spec: KVCacheSpec,
        *,
        layout: str | None = None,
        block_size: int | None = None,
    ) -> PagedCache:
        """Recognise the layout of `kvcaches`, one tensor per layer. Reads no tensor data; does not block.

        A mapping whose names all hold a number is taken in natural order of its names ("layers.2" before "layers.10"), so
        that the order of insertion does not decide the bytes; other mappings and sequences are taken as they come.
        `layout`: a layout name, see the module's text. `block_size`: the tokens of a block, to rule out other readings.

        Raises `SpecError` when the tensors contradict `spec` (number of layers, dtype, heads, head size), `LayoutError` when no
        layout explains shape, strides or dtype, or when two do. The text names the layer and what was seen and expected.
        """
        names, tensors = _ordered(kvcaches)
        if len(tensors) != spec.num_layers:
            raise SpecError(
                f"kvcaches: {len(tensors)} tensors for spec.num_layers={spec.num_layers}; pass one tensor per layer"
            )
        found = ""
        for name, tensor in zip(names, tensors, strict=True):
            _check_dtype(name, tensor, spec)
            named = _recognise(name, tensor, spec, layout or found or None, block_size)
            found = found or named
        shape, device = tensors[0].shape, tensors[0].device
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.shape != shape or tensor.device != device:
                raise LayoutError(
                    f"kvcaches[{name}]: shape {tuple(tensor.shape)} on {tensor.device}, but the first layer has "
                    f"{tuple(shape)} on {device}; all layers of one spec must agree"
                )
        parts = [part for tensor in tensors for part in _layer_regions(tensor, found, spec)]
        num_blocks, tokens = shape[found.index("B")], shape[found.index("N")]
        return cls(spec, found, names, tensors, tuple(_joined(parts)), num_blocks, tokens, device)

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def row_bytes(self) -> int:
        return self.spec.row_bytes

    def holds(self, kvcaches: Sequence[torch.Tensor] | Mapping[str, torch.Tensor]) -> bool:
        """Whether these are the very tensors that this was bound to, so that it may be used for them. Takes microseconds."""
        if len(kvcaches) != len(self.tensors):
            return False
        given = map(kvcaches.get, self.names) if isinstance(kvcaches, Mapping) else iter(kvcaches)
        return all(a is b for a, b in zip(given, self.tensors, strict=True)) and all(
            tensor.data_ptr() == address for tensor, address in zip(self.tensors, self._addresses, strict=True)
        )

    @property
    def _addresses(self) -> list[int]:
        per_layer = len(self.regions) // len(self.tensors)
        return [region.address for region in self.regions[::per_layer]]

    def check_slot_mapping(self, slot_mapping: torch.Tensor, count: int) -> None:
        """Raise `ArgumentError` unless `slot_mapping` is a contiguous 1-D int64 or int32 tensor of `count` slots of this cache.

        Values of a tensor on a GPU are not looked at, because that would wait for the device: the CUDA mover skips slots out
        of range, counts them, leaves the chunk unverified and reports them from `Transfer.wait`.
        """
        check_slot_mapping(slot_mapping, count, self.num_slots)


def device_name(device: torch.device) -> str:
    """Name a device as `SegmentInfo.device` does: `"host"` for CPU memory, `"GPU-<uuid>"` for a GPU, which means the same in
    every process, whatever `CUDA_VISIBLE_DEVICES` says. Takes microseconds after the first call for a device."""
    if device.type != "cuda":
        return "host"
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def check_slot_mapping(slot_mapping: torch.Tensor, count: int, num_slots: int) -> None:
    """Raise `ArgumentError` for what is no slot mapping of `num_slots` slots (`PagedCache.check_slot_mapping`)."""
    dtype = str(getattr(slot_mapping, "dtype", type(slot_mapping).__name__))
    if dtype not in ("torch.int64", "torch.int32"):
        raise ArgumentError(f"slot_mapping: expected a tensor of torch.int64 or torch.int32, got {dtype}")
    if slot_mapping.dim() != 1 or slot_mapping.shape[0] != count:
        raise ArgumentError(f"slot_mapping: expected shape ({count},), got {tuple(slot_mapping.shape)}")
    if not slot_mapping.is_contiguous():
        raise ArgumentError("slot_mapping: must be contiguous; pass slot_mapping.contiguous()")
    if count and not slot_mapping.is_cuda:
        low, high = (int(value) for value in slot_mapping.aminmax())
        if low < 0 or high >= num_slots:
            wrong = low if low < 0 else high
            raise ArgumentError(f"slot_mapping: slot {wrong} is outside of the cache's [0, {num_slots})")


def _ordered(
    kvcaches: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
) -> tuple[tuple[str, ...], tuple[torch.Tensor, ...]]:
    if not isinstance(kvcaches, Mapping):
        if hasattr(kvcaches, "stride"):
            raise LayoutError("kvcaches: expected a list or dict with one tensor per layer, got a single tensor")
        return tuple(map(str, range(len(kvcaches)))), tuple(kvcaches)
    names = list(kvcaches)
    if all(re.search(r"\d", name) for name in names):
        names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    return tuple(names), tuple(kvcaches[name] for name in names)


def _check_dtype(name: str, tensor: torch.Tensor, spec: KVCacheSpec) -> None:
    dtype = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise LayoutError(f"kvcaches[{name}]: dtype {dtype} is not one of {', '.join(sorted(DTYPE_BYTES))}")
    # A quantised cache often comes as bytes: every one-byte type carries every other.
    if dtype != spec.dtype and not DTYPE_BYTES[dtype] == spec.element_bytes == 1:
        raise SpecError(f"kvcaches[{name}]: dtype {dtype}, but spec.dtype is {spec.dtype}")


def _sizes(spec: KVCacheSpec, block_size: int | None) -> dict[str, int | None]:
    content = spec.head_size * (1 if spec.row_format == "mla" else 2)
    return {"2": 2, "1": 1, "B": None, "N": block_size, "H": spec.num_kv_heads, "D": spec.head_size, "C": content}


def _fits(shape: Sequence[int], layout: str, sizes: dict[str, int | None], ignore: str = "") -> bool:
    return len(shape) == len(layout) and all(
        size >= 1 and (axis in ignore or sizes[axis] in (None, size)) for axis, size in zip(layout, shape, strict=True)
    )


def _spelled(layout: str, sizes: dict[str, int | None]) -> str:
    return f"{layout} = [{', '.join(axis if sizes[axis] is None else str(sizes[axis]) for axis in layout)}]"


def _recognise(name: str, tensor: torch.Tensor, spec: KVCacheSpec, wanted: str | None, block_size: int | None) -> str:
    """The layout name of one layer's tensor."""
    kind = "mla" if spec.row_format == "mla" else "heads"
    known, named = KNOWN_LAYOUTS[kind], NAMED_LAYOUTS[kind]
    if wanted is not None and wanted not in known + named:
        raise LayoutError(f"layout: {wanted!r} is not one of {', '.join(known + named)} (row_format {spec.row_format!r})")
    sizes, shape = _sizes(spec, block_size), tuple(tensor.shape)
    candidates = known if wanted is None else (wanted,)
    fitting = [layout for layout in candidates if _fits(shape, layout, sizes)]
    if len(fitting) > 1:
        names = " or ".join(f"layout={layout!r}" for layout in fitting)
        raise LayoutError(f"kvcaches[{name}]: shape {shape} fits {' and '.join(fitting)}; pass {names}")
    if not fitting:
        expected = " or ".join(_spelled(layout, sizes) for layout in candidates)
        others = [layout for layout in known + named if layout not in candidates and _fits(shape, layout, sizes)]
        hint = f"; if it is {_spelled(others[0], sizes)}, pass layout={others[0]!r}" if others else ""
        contradicts = not others and any(_fits(shape, layout, sizes, ignore="HDC") for layout in candidates)
        error = SpecError if contradicts else LayoutError
        raise error(
            f"kvcaches[{name}]: shape {shape} does not fit row_format {spec.row_format!r}, num_kv_heads={spec.num_kv_heads}, "
            f"head_size={spec.head_size}: expected {expected}{hint}"
        )
    for axis, size, stride in zip(fitting[0], shape, tensor.stride(), strict=True):
        if size > 1 and (stride != 1 if axis in "DC" else stride < 1):
            raise LayoutError(
                f"kvcaches[{name}]: stride {stride} of axis {axis} in {fitting[0]} (shape {shape}, strides {tensor.stride()}): "
                f"expected {'1: the content of a head must be contiguous' if axis in 'DC' else 'a positive stride'}"
            )
    return fitting[0]


def _layer_regions(tensor: torch.Tensor, layout: str, spec: KVCacheSpec) -> list[Region]:
    """The layer's regions in payload order, pieces not yet joined: one piece per head."""
    element = spec.element_bytes
    stride = {axis: step * element for axis, step in zip(layout, tensor.stride(), strict=True)}
    head = spec.head_size * element
    plane = stride.get("2", head)
    first = Region(tensor.data_ptr(), stride["B"], stride["N"], spec.num_kv_heads, head, stride.get("H", head))
    if spec.row_format == "planes":
        return [first, first._replace(address=first.address + plane)]
    if spec.row_format == "fused":
        return [first._replace(halves=2, half_stride=plane)]
    return [first]


def _joined(regions: list[Region]) -> list[Region]:
    """The same rows in as few pieces as all regions allow."""
    if all(region.halves == 2 and region.half_stride == region.piece_bytes for region in regions):
        regions = [region._replace(halves=1, half_stride=0, piece_bytes=2 * region.piece_bytes) for region in regions]
    if all(region.halves == 1 and (region.pieces == 1 or region.piece_stride == region.piece_bytes) for region in regions):
        regions = [region._replace(pieces=1, piece_bytes=region.row_bytes, piece_stride=region.row_bytes) for region in regions]
    return regions
