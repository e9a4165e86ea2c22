"""The CPU mover against a naive model, byte for byte, and the header protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from paged_cases import cases
from paged_world import DTYPES, MLA_ORDERS, NAMESPACE, ORDERS, WRITER, Case, make_spec, round_trip
from protocol_suite import SUITE, Bench

from vcache.config import TransferConfig
from vcache.errors import DeviceUnavailableError, SegmentError
from vcache.paged import select
from vcache.paged.cpu_mover import CpuMover
from vcache.paged.layout import PagedCache
from vcache.paged.select import mover_for
from vcache.segment.mapping import MappedSlab

SETTINGS = settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


@SETTINGS
@given(cases())
def test_round_trip_equals_the_naive_model(case: Case) -> None:
    round_trip(case, CpuMover())


@pytest.mark.parametrize(("layout", "dtype"), list(product(ORDERS, DTYPES)))
def test_every_layout_and_dtype(layout: tuple[str, str], dtype: str) -> None:
    for row_format, mapping in product(("planes", "fused"), ("consecutive", "blocks", "random")):
        spec = make_spec(dtype, row_format=row_format)
        round_trip(Case(spec, layout, layout, 4, 4, (16, 16, 5), 3, 2, 0, mapping, 7), CpuMover())


@pytest.mark.parametrize(("layout", "dtype"), list(product(MLA_ORDERS, DTYPES)))
def test_every_mla_layout_and_dtype(layout: tuple[str, str], dtype: str) -> None:
    for mapping in ("consecutive", "blocks", "random"):
        spec = make_spec(dtype, head_size=12, row_format="mla")
        round_trip(Case(spec, layout, layout, 4, 4, (16, 16, 5), 3, 2, 0, mapping, 7), CpuMover())


@pytest.mark.parametrize("row_format", ["planes", "fused"])
def test_instances_with_different_layouts_share_chunks(row_format: str) -> None:
    spec = make_spec(heads=3, row_format=row_format)
    for source, target in product(ORDERS, ORDERS):
        round_trip(Case(spec, source, target, 4, 8, (16, 3), 2, 0, 0, "blocks", 1), CpuMover())


def test_int32_slot_mapping() -> None:
    round_trip(Case(make_spec(), ORDERS[0], ORDERS[6], 4, 4, (16,), 0, 0, 0, "random", 1), CpuMover(), dtype=torch.int32)


@pytest.mark.parametrize("rule", SUITE)
def test_protocol(rule: Callable[[Bench], None]) -> None:
    rule(Bench(CpuMover()))


def test_header_is_odd_and_signed_while_the_payload_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(CpuMover())
    ticket = bench.slots.transfer(2, 8, 0)
    seen: list[bytes] = []
    move = CpuMover._move
    monkeypatch.setattr(
        CpuMover, "_move", lambda *args, **kwargs: (seen.append(bench.slots.header_at(2)), move(*args, **kwargs))
    )
    assert bench.store(ticket) == [True]
    assert seen == [ticket.header.writing(WRITER).pack()]
    assert WRITER in seen[0]
    assert NAMESPACE not in seen[0]


def test_a_header_that_changes_during_the_transfer_spoils_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(CpuMover())
    ticket = bench.slots.transfer(2, 8, 0)
    assert bench.store(ticket) == [True]
    again = bench.slots.transfer(2, 8, 0)
    other = again.header._replace(generation=again.header.generation + 7).pack()
    move = CpuMover._move
    monkeypatch.setattr(
        CpuMover,
        "_move",
        lambda *args, **kwargs: (move(*args, **kwargs), bench.slots.write(ticket.slot.header_offset, other)),
    )
    assert bench.load(ticket) == [False]
    bench.slots.write(ticket.slot.header_offset, ticket.header.pack())
    assert bench.store(again) == [False]
    assert bench.slots.header_at(2) == other


def test_vram_is_out_of_reach_of_the_cpu() -> None:
    bench = Bench(CpuMover())
    ticket = bench.slots.transfer(0, 8, 0)
    vram = MappedSlab("cuda", "GPU-0", 1 << 20, 1 << 40, device_address=1 << 40)
    with pytest.raises(SegmentError, match="out of reach"):
        bench.load(ticket._replace(slot=ticket.slot._replace(slab=vram)))


def test_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(None)
    assert isinstance(mover_for(bench.cache, TransferConfig()), CpuMover)
    with pytest.raises(DeviceUnavailableError, match="meta"):
        mover_for(PagedCache.bind([tensor.to("meta") for tensor in bench.tensors], bench.spec), TransferConfig())
    monkeypatch.setattr(select, "find_spec", lambda _: None)
    with pytest.raises(DeviceUnavailableError, match="Triton"):
        mover_for(dataclasses.replace(bench.cache, device=torch.device("cuda")), TransferConfig())
