"""Recognition of paged layouts, where their rows lie, and every way in which tensors can be wrong."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from paged_world import DTYPES, MLA_ORDERS, ORDERS, Model, make_spec, make_tensors

from vcache.errors import ArgumentError, LayoutError, SpecError
from vcache.paged.layout import NAMED_LAYOUTS, PagedCache, Region, check_slot_mapping
from vcache.paged.plan import MAX_PARTS, Blocks, Rows, Run, plan


def read(region: Region, slot: int, block_size: int) -> bytes:
    """The row's bytes, straight from memory."""
    import ctypes

    base = region.address + slot // block_size * region.block_stride + slot % block_size * region.token_stride
    return b"".join(
        ctypes.string_at(base + p * region.piece_stride + h * region.half_stride, region.piece_bytes)
        for p in range(region.pieces)
        for h in range(region.halves)
    )


@pytest.mark.parametrize(("layout", "row_format"), [*product(ORDERS, ("planes", "fused")), *product(MLA_ORDERS, ("mla",))])
def test_regions_point_at_the_rows(layout: tuple[str, str], row_format: str) -> None:
    spec = make_spec(layers=3, heads=3, row_format=row_format)
    tensors = make_tensors(spec, *layout, num_blocks=5, block_size=4, pad=6)
    named = layout[0] if layout[0] in NAMED_LAYOUTS["heads"] else None
    cache = PagedCache.bind(tensors, spec, layout=named)
    assert cache.layout == layout[0]
    assert (cache.num_blocks, cache.block_size, cache.num_slots) == (5, 4, 20)
    assert len(cache.regions) == spec.regions
    assert {region.row_bytes for region in cache.regions} == {spec.row_bytes}
    model = Model(spec, layout[0], tensors)
    for slot in range(cache.num_slots):
        assert b"".join(read(region, slot, 4) for region in cache.regions) == model.gather([slot])


def test_contiguous_heads_are_one_piece() -> None:
    def pieces(layout: tuple[str, str], row_format: str) -> tuple[int, int]:
        spec = make_spec(heads=4, row_format=row_format)
        region = PagedCache.bind(make_tensors(spec, *layout, 5, 3), spec).regions[0]
        return region.pieces, region.halves

    assert pieces(("2BNHD", "L2BNHD"), "planes") == (1, 1)
    assert pieces(("2BNHD", "L2BHND"), "planes") == (4, 1)
    assert pieces(("BHNC", "LBNHC"), "fused") == (1, 1)
    assert pieces(("BHNC", "LBHNC"), "fused") == (4, 1)
    assert pieces(("BHNC", "LBNHC"), "planes") == (4, 1)
    assert pieces(("2BNHD", "L2BNHD"), "fused") == (4, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str) -> None:
    spec = make_spec(dtype)
    assert PagedCache.bind(make_tensors(spec, *ORDERS[0], 4, 4), spec).row_bytes == spec.row_bytes


def test_bytes_stand_for_any_one_byte_type() -> None:
    tensors = make_tensors(make_spec("uint8"), *ORDERS[0], 4, 4)
    assert PagedCache.bind(tensors, make_spec("float8_e4m3fn")).num_blocks == 4


def test_mapping_is_taken_in_natural_order() -> None:
    spec = make_spec(layers=11)
    tensors = make_tensors(spec, *ORDERS[0], 3, 4)
    named = {f"model.layers.{layer}.attn": tensors[layer] for layer in reversed(range(11))}
    assert PagedCache.bind(named, spec).regions == PagedCache.bind(tensors, spec).regions
    plain = dict(zip("kjihgfedcba", tensors, strict=True))
    assert PagedCache.bind(plain, spec).regions == PagedCache.bind(tensors, spec).regions


def test_holds_only_the_same_tensors() -> None:
    spec = make_spec()
    tensors = make_tensors(spec, *ORDERS[0], 3, 4)
    cache = PagedCache.bind({"0": tensors[0], "1": tensors[1]}, spec)
    assert cache.holds(tensors)
    assert cache.holds({"1": tensors[1], "0": tensors[0]})
    assert not cache.holds({"1": tensors[0], "0": tensors[1]})
    assert not cache.holds(tensors[::-1])
    assert not cache.holds(tensors[:1])
    assert not cache.holds([*tensors[:1], tensors[1].clone()])
    tensors[1].data = tensors[1].data.clone()
    assert not cache.holds(tensors)


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "keywords", "error", "text"),
    [
        ((2, 2, 4, 2, 8), {}, LayoutError, "layout='2BNHD' or layout='B2NHD'"),
        ((2, 6, 4, 3, 8), {}, SpecError, "num_kv_heads=2"),
        ((2, 6, 4, 2, 9), {}, SpecError, "head_size=8"),
        ((6, 2, 4, 15), {}, SpecError, "16"),
        ((2, 6, 2, 4, 8), {}, LayoutError, "pass layout='2BHND'"),
        ((6, 2, 2, 4, 8), {}, LayoutError, "pass layout='B2HND'"),
        ((6, 4, 2, 16), {}, LayoutError, "pass layout='BNHC'"),
        ((3, 6, 4, 2, 8), {}, LayoutError, r"shape \(3, 6, 4, 2, 8\)"),
        ((6, 4, 16), {}, LayoutError, "expected 2BNHD"),
        ((2, 6, 4, 2, 8), {"block_size": 8}, LayoutError, "8, 2, 8"),
        ((2, 6, 4, 2, 8), {"layout": "NHD"}, LayoutError, "'NHD' is not one of 2BNHD"),
        ((2, 6, 4, 2, 8), {"layout": "BNC"}, LayoutError, "not one of"),
        ((2, 6, 4, 2, 8), {"layout": "B2NHD"}, LayoutError, "pass layout='2BNHD'"),
        ((2, 0, 4, 2, 8), {}, LayoutError, "shape"),
    ],
)
def test_wrong_shapes(shape: tuple[int, ...], keywords: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        PagedCache.bind([bf16(*shape)] * 2, make_spec(), **keywords)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is error


@pytest.mark.parametrize("layout", ["2BNHD", "B2NHD"])
def test_ambiguity_is_settled_by_name(layout: str) -> None:
    cache = PagedCache.bind([bf16(2, 2, 4, 2, 8)] * 2, make_spec(), layout=layout)
    assert cache.layout == layout


def test_as_many_heads_as_tokens_in_a_block_means_the_documented_order() -> None:
    assert PagedCache.bind([bf16(2, 6, 4, 4, 8)] * 2, make_spec(heads=4)).layout == "2BNHD"
    assert PagedCache.bind([bf16(2, 6, 4, 4, 8)] * 2, make_spec(heads=4), layout="2BHND").layout == "2BHND"


def test_mla_shapes() -> None:
    spec = make_spec(row_format="mla")
    assert PagedCache.bind([bf16(6, 4, 8)] * 2, spec).layout == "BNC"
    assert PagedCache.bind([bf16(6, 1, 4, 8)] * 2, spec).layout == "B1NC"
    with pytest.raises(SpecError, match="head_size=8"):
        PagedCache.bind([bf16(6, 4, 9)] * 2, spec)
    with pytest.raises(LayoutError, match="expected BNC"):
        PagedCache.bind([bf16(2, 6, 4, 1, 8)] * 2, spec)


def test_tensors_that_contradict_each_other_or_the_spec() -> None:
    spec, good = make_spec(), bf16(2, 6, 4, 2, 8)
    with pytest.raises(SpecError, match="3 tensors for"):
        PagedCache.bind([good] * 3, spec)
    with pytest.raises(SpecError, match=r"kvcaches\[b1\]: dtype float16, but spec.dtype is bfloat16"):
        PagedCache.bind({"a0": good, "b1": good.half()}, spec)
    with pytest.raises(LayoutError, match=r"kvcaches\[0\]: dtype int32"):
        PagedCache.bind([good.int()] * 2, spec)
    with pytest.raises(LayoutError, match=r"kvcaches\[1\]: dtype str"):
        PagedCache.bind([good, "x"], spec)  # type: ignore[list-item]
    with pytest.raises(LayoutError, match="single tensor"):
        PagedCache.bind(good, spec)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match=r"kvcaches\[1\]: shape \(2, 7, 4, 2, 8\)"):
        PagedCache.bind([good, bf16(2, 7, 4, 2, 8)], spec)
    with pytest.raises(LayoutError, match=r"kvcaches\[1\]"):
        PagedCache.bind([good, good.to("meta")], spec)


def test_strides_that_no_cache_has() -> None:
    spec = make_spec()
    with pytest.raises(LayoutError, match="axis D"):
        PagedCache.bind([bf16(2, 6, 4, 8, 2).transpose(3, 4)] * 2, spec)
    with pytest.raises(LayoutError, match="axis B"):
        PagedCache.bind([bf16(2, 1, 4, 2, 8).expand(2, 6, 4, 2, 8)] * 2, spec)


@pytest.mark.parametrize(
    ("mapping", "count", "text"),
    [
        (torch.zeros(4), 4, "float32"),
        ([1, 2], 2, "got list"),
        (torch.arange(4), 5, r"\(5,\), got \(4,\)"),
        (torch.arange(4)[None], 4, "shape"),
        (torch.arange(8)[::2], 4, "contiguous"),
        (torch.tensor([0, -2]), 2, "slot -2"),
        (torch.tensor([0, 24]), 2, r"slot 24 is outside of the cache's \[0, 24\)"),
    ],
)
def test_wrong_slot_mappings(mapping: Any, count: int, text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        PagedCache.bind([bf16(2, 6, 4, 2, 8)] * 2, make_spec()).check_slot_mapping(mapping, count)


def test_right_slot_mappings() -> None:
    for mapping in (torch.arange(24), torch.arange(24, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)):
        check_slot_mapping(mapping, len(mapping), 24)


def test_plan_covers_every_token_once_in_few_parts() -> None:
    def parts(slots: list[int], seamless: bool = True) -> list[Any]:
        found = plan(np.array(slots, np.int64), 4, seamless)
        covered: list[int] = []
        for part in found:
            assert part.first == len(covered)
            if isinstance(part, Run):
                covered += range(part.slot, part.slot + part.tokens)
            elif isinstance(part, Blocks):
                covered += (part.blocks[:, None] * 4 + np.arange(4)).flatten().tolist()
            else:
                covered += part.slots.tolist()
        assert covered == slots
        return [type(part) for part in found]

    block = [[4 * b + i for i in range(4)] for b in range(40)]
    assert parts([]) == []
    assert parts([5]) == [Run]
    assert parts([3, 4, 5, 6, 7, 8]) == [Run]
    assert parts([3, 4, 5, 6, 7, 8], seamless=False) == [Run, Run, Run]
    assert parts(block[3] + block[4]) == [Run]
    assert parts(block[3] + block[4], seamless=False) == [Blocks]
    assert parts(block[5] + block[2] + block[9]) == [Blocks]
    assert parts([2, 3, *block[5], *block[2], 12, 13]) == [Run, Blocks, Run]
    assert parts([5, 3, 11, 2]) == [Rows]
    assert parts([3, 2, *block[5], 9, 10]) == [Rows, Run, Run]
    assert parts([slot for b in range(MAX_PARTS) for slot in [*block[2 * b + 2], 2 * b]]) == [Rows]


def test_layout_needs_no_torch() -> None:
    modules = "vcache.paged.layout, vcache.paged.select, vcache.paged.mover"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'numpy', 'triton'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
