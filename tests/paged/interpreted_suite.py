"""The CUDA mover's kernels on CPU tensors. Not collected by itself: `test_interpreted_mover.py` runs it in a process where
TRITON_INTERPRET=1 is set before Triton is imported."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from paged_cases import cases
from paged_world import MLA_ORDERS, ORDERS, WRITER, Case, Slots, make_spec, make_tensors, round_trip
from protocol_suite import SUITE, Bench

from vcache.errors import ArgumentError, DeviceUnavailableError
from vcache.paged import kernels
from vcache.paged.checksum import trailer
from vcache.paged.cpu_mover import CpuMover
from vcache.paged.gpu_mover import GpuMover
from vcache.paged.gpu_staging import TablePool
from vcache.paged.layout import PagedCache

SETTINGS = settings(derandomize=True, deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def mover() -> GpuMover:
    return GpuMover(torch.device("cpu"))


@SETTINGS
@given(cases(max_tokens=20, max_layers=2))
def test_round_trip_equals_the_naive_model(case: Case) -> None:
    round_trip(case, GpuMover(torch.device("cpu"), grid=3))


@pytest.mark.parametrize("layout", ORDERS + MLA_ORDERS)
def test_bytes_equal_the_cpu_movers(layout: tuple[str, str], mover: GpuMover) -> None:
    """One slab written by each mover from the same cache, and one cache written from either slab."""
    for number, row_format in enumerate(("mla",) if layout in MLA_ORDERS else ("planes", "fused")):
        spec = make_spec(("bfloat16", "float8_e5m2")[number], head_size=6, heads=3, row_format=row_format)
        source = PagedCache.bind(make_tensors(spec, *layout, 6, 4, pad=3), spec, layout=layout[0])
        mapping = torch.randperm(24, generator=torch.Generator().manual_seed(1))
        slabs, targets = [], []
        for kind in (CpuMover(), mover):
            slots = Slots.make(spec, 8, 3)
            transfers = [slots.transfer(0, 8, 0), slots.transfer(1, 8, 8), slots.transfer(2, 5, 16)]
            assert kind.store(source, mapping, transfers, WRITER).verified() == [True] * 3
            target = make_tensors(spec, *layout, 6, 4, pad=3, seed=1)
            loads = [transfers[0]._replace(skip=3, start=3), *transfers[1:]]
            assert kind.load(PagedCache.bind(target, spec, layout=layout[0]), mapping, loads).verified() == [True] * 3
            slabs.append(slots.read(0, slots.slab.nbytes))
            targets.append(b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in target))
        assert slabs[0] == slabs[1]
        assert targets[0] == targets[1]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float32"])
def test_every_word_width(dtype: str, mover: GpuMover) -> None:
    for head_size, (layout, row_format) in product((1, 2, 4, 8), ((ORDERS[0], "planes"), (ORDERS[7], "fused"))):
        spec = make_spec(dtype, 1, 3, head_size, row_format)
        round_trip(Case(spec, layout, layout, 4, 4, (9,), 1, 0, 0, "random", 3), mover)


@pytest.mark.parametrize(
    ("dtype", "heads", "head_size", "tokens"),
    [("uint8", 1, 3, 1), ("uint8", 1, 3, 7), ("bfloat16", 4, 64, 15), ("bfloat16", 4, 64, 16), ("float32", 2, 61, 13)],
)
def test_checksums_equal_numpys(dtype: str, heads: int, head_size: int, tokens: int, mover: GpuMover) -> None:
    """Payloads that end within a word or a block, or with one."""
    spec = make_spec(dtype, 2, heads, head_size)
    source = PagedCache.bind(make_tensors(spec, *ORDERS[0], 8, 4), spec)
    for programs in (1, 3):
        slots = Slots.make(spec, tokens, 4)
        tickets = [slots.transfer(slot, tokens, 0) for slot in (0, 2)]
        tickets = [
            ticket._replace(trailer=slots.pinned(slot + 1).payload_offset) for slot, ticket in zip((0, 2), tickets, strict=True)
        ]
        kind = GpuMover(torch.device("cpu"), grid=programs)
        assert kind.store(source, torch.arange(32), tickets, WRITER).verified() == [True] * 2
        for slot, ticket in zip((0, 2), tickets, strict=True):
            expected = trailer(memoryview(slots.payload_at(slot, tokens)), ticket.header.generation)
            assert slots.read(ticket.trailer, len(expected)) == expected
        for reader in (mover, CpuMover()):
            assert reader.load(source, torch.arange(32), tickets).verified() == [True] * 2


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_payloads_at_odd_addresses(shift: int, mover: GpuMover) -> None:
    spec = make_spec()

    class Shifted(Slots):
        def pinned(self, slot: int) -> Any:
            place = super().pinned(slot)
            return place._replace(payload_offset=place.payload_offset + shift)

    slots = Shifted.make(spec, 10, 2)
    slots.slots = 1
    cache = PagedCache.bind(make_tensors(spec, *ORDERS[0], 4, 4), spec)
    assert mover._shape(cache, slots.slab.device_address + slots.pinned(0).payload_offset).tiling.unit_bytes == shift
    round_trip(Case(spec, ORDERS[0], ORDERS[6], 4, 4, (9,), 1, 0, 0, "random", 3), mover, slots)


@pytest.mark.parametrize("rule", SUITE)
def test_protocol(rule: Callable[[Bench], None], mover: GpuMover) -> None:
    rule(Bench(mover))


def test_header_is_odd_and_signed_while_the_payload_moves(mover: GpuMover, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(mover)
    ticket = bench.slots.transfer(2, 8, 0)
    seen: list[bytes] = []
    _around_move(monkeypatch, mover, lambda: seen.append(bench.slots.header_at(2)))
    assert bench.store(ticket) == [True]
    assert seen == [ticket.header.writing(WRITER).pack()]


def test_a_header_that_changes_during_the_transfer_spoils_it(mover: GpuMover, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(mover)
    ticket = bench.slots.transfer(2, 8, 0)
    assert bench.store(ticket) == [True]
    again = bench.slots.transfer(2, 8, 0)
    other = again.header._replace(generation=again.header.generation + 7).pack()
    _around_move(monkeypatch, mover, lambda: bench.slots.write(ticket.slot.header_offset, other))
    assert bench.load(ticket) == [False]
    bench.slots.write(ticket.slot.header_offset, ticket.header.pack())
    assert bench.store(again) == [False]
    assert bench.slots.header_at(2) == other


@pytest.mark.parametrize(("wrong", "count"), [(-1, 1), (32, 1), (2**40, 3)])
def test_slots_out_of_range_are_skipped_and_counted(
    wrong: int, count: int, mover: GpuMover, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a mapping in VRAM, whose values nobody can check in time."""
    monkeypatch.setattr(PagedCache, "check_slot_mapping", lambda *_: None)
    bench = Bench(mover)
    ticket, good = bench.slots.transfer(0, 8, 0), bench.slots.transfer(1, 8, 8)
    assert bench.store(ticket, good) == [True, True]
    bench.mapping = bench.mapping.clone()
    bench.mapping[2 : 2 + count] = wrong
    loaded = mover.load(bench.cache, bench.mapping, [ticket, good])
    assert loaded.verified() == [False, True]
    with pytest.raises(ArgumentError, match=f"{count} slots are outside"):
        loaded.wait()
    ticket = bench.slots.transfer(0, 8, 0)
    assert mover.store(bench.cache, bench.mapping, [ticket, good], WRITER).verified()[0] is False
    assert bench.slots.header_at(0) == ticket.header.writing(WRITER).pack()


def test_tables_are_reused_and_results_kept(mover: GpuMover) -> None:
    bench = Bench(GpuMover(torch.device("cpu")))
    tickets = [bench.slots.transfer(number, 8, 0) for number in range(4)]
    transfers = [bench.mover.store(bench.cache, bench.mapping, [ticket], WRITER) for ticket in tickets]
    pool = bench.mover._lanes[True].tables
    assert len(pool._busy) + len(pool._free) == 1
    assert [transfer.verified() for transfer in transfers] == [[True]] * 4


class Waiter:
    def __init__(self) -> None:
        self.settled = 0

    def settle(self) -> None:
        self.settled += 1


@dataclass
class Event:
    over: bool

    def query(self) -> bool:
        return self.over


def test_a_table_is_reused_after_its_event_and_settles_its_owner_first() -> None:
    pool, waiter, event = TablePool(torch.device("cpu"), nullcontext), Waiter(), Event(False)
    table = pool.take(64, 100)
    table.event, table.owner = event, weakref.ref(waiter)
    pool.put(table)
    assert pool.take(1, 100) is not table
    assert waiter.settled == 0
    event.over = True
    assert pool.take(1, 10**6) is not table  # too small, and dropped for the larger one
    assert waiter.settled == 1
    assert pool._free == []


def test_preparing_touches_neither_cache_nor_headers(mover: GpuMover) -> None:
    bench = Bench(mover)
    assert bench.untouched(lambda: mover.prepare(bench.cache))


def test_a_cache_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "move", triton.JITFunction(kernels.move.fn))
    with pytest.raises(DeviceUnavailableError, match="TRITON_INTERPRET=1"):
        GpuMover(torch.device("cpu"))


def _around_move(monkeypatch: pytest.MonkeyPatch, mover: GpuMover, action: Callable[[], Any]) -> None:
    """Run `action` once between the kernels that announce and that publish."""
    move = kernels.move
    mover._shapes.clear()  # launches remember their kernels

    class Spy:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                action()
                move[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(kernels, "move", Spy())
