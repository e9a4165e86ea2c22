"""The CUDA mover's way through a ring, with kernels on CPU tensors and copies done at once. Not collected by itself, as
`interpreted_suite.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from paged_cases import cases
from paged_world import ORDERS, WRITER, Case, Model, Slots, make_spec, make_tensors, round_trip
from protocol_suite import SUITE, Bench

from vcache.paged import kernels
from vcache.paged.columns import SlotColumns
from vcache.paged.gpu_mover import GpuMover
from vcache.paged.layout import PagedCache
from vcache.segment.mapping import MappedSlab

SETTINGS = settings(derandomize=True, deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
CPU = torch.device("cpu")
PAYLOAD = 1024
"""Bytes of a chunk of `Bench`."""


def ringed(staging: int = 8 * PAYLOAD, **options: Any) -> GpuMover:
    """Two chunks of a store at a time, six of a load."""
    return GpuMover(CPU, staging=staging, **({"ring_from": 0} | options))


@pytest.fixture(scope="module")
def mover() -> GpuMover:
    return ringed()


def vram_slots(spec: Any, tokens: int, slots: int = 4) -> Slots:
    """What the mover takes for memory of a GPU."""
    host = Slots.make(spec, tokens, slots)
    slab = host.slab
    host.slab = MappedSlab(
        "cuda", "GPU-0", slab.nbytes, slab.address, device_address=slab.address, buffer=slab.buffer, resource=slab
    )
    return host


def batches(mover: GpuMover, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks of every batch that begins from now on."""
    counts: list[int] = []
    for ring in mover._rings.values():
        assert ring is not None
        begin = ring.begin
        monkeypatch.setattr(ring, "begin", lambda batch, begin=begin: (counts.append(batch.chunks), begin(batch)))
    return counts


@SETTINGS
@given(cases(max_tokens=20, max_layers=2))
def test_round_trip_equals_the_naive_model(case: Case) -> None:
    most = -(-case.spec.payload_bytes(max(case.tokens)) // 256) * 256
    round_trip(case, GpuMover(CPU, grid=3, staging=8 * most, ring_from=0))


@pytest.mark.parametrize("rule", SUITE)
def test_protocol(rule: Callable[[Bench], None], mover: GpuMover) -> None:
    rule(Bench(mover))


def test_a_request_larger_than_the_ring_goes_round(monkeypatch: pytest.MonkeyPatch) -> None:
    mover = ringed(12 * PAYLOAD)
    spec = make_spec()
    tensors = make_tensors(spec, *ORDERS[0], num_blocks=32, block_size=4)
    cache, slots, mapping = PagedCache.bind(tensors, spec), Slots.make(spec, 8, 16), torch.arange(128).flip(0)
    warm = slots.transfer(0, 8, 0)
    assert mover.store(cache, mapping, [warm], WRITER).verified() == mover.load(cache, mapping, [warm]).verified() == [True]
    counts = batches(mover, monkeypatch)
    before = Model(spec, ORDERS[0][0], tensors)
    tickets = [slots.transfer(slot, 8, 8 * slot) for slot in range(16)]
    assert mover.store(cache, mapping, tickets, WRITER).verified() == [True] * 16
    assert (sum(counts), max(counts)) == (16, 2)
    counts.clear()
    for number in range(16):
        assert slots.payload_at(number, 8) == before.gather(mapping[8 * number : 8 * number + 8].tolist())
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(0)
    assert mover.load(cache, mapping, tickets).verified() == [True] * 16
    assert (sum(counts), max(counts)) == (16, 2)
    assert before.equals(tensors)


@pytest.mark.parametrize("sealed", [False, True])
def test_one_call_mixes_vram_and_host_slots(sealed: bool, mover: GpuMover) -> None:
    spec = make_spec()
    far = Bench(mover, vram_slots(spec, 8, 8))
    near = Slots.make(spec, 8, 8)
    tickets = []
    for number in range(4):
        slots = far.slots if number % 2 else near
        ticket = slots.transfer(number & 2, 8, 8 * number)
        tickets.append(ticket._replace(trailer=slots.pinned((number & 2) + 1).payload_offset) if sealed else ticket)
    before = Model(spec, ORDERS[0][0], far.tensors)
    assert far.store(*tickets) == [True] * 4
    for tensor in far.tensors:
        tensor.view(torch.uint8).fill_(0)
    assert far.load(*tickets) == [True] * 4
    assert before.equals(far.tensors)
    for wrong, slots in ((2, near), (1, far.slots)):
        stale = list(tickets)
        stale[wrong] = stale[wrong]._replace(header=stale[wrong].header._replace(generation=500))
        assert far.load(*stale) == [number != wrong for number in range(4)], "results are those of the request's order"
        if sealed:
            at = tickets[wrong].slot.payload_offset + 9
            (byte,) = slots.read(at, 1)
            slots.write(at, bytes([byte ^ 1]))
            assert far.damaged(*tickets) == [wrong]
            slots.write(at, bytes([byte]))


@pytest.mark.parametrize("why", ["a newer header", "a later format"])
def test_a_refused_slot_keeps_its_bytes_though_its_copy_cannot_be_called_off(why: str, mover: GpuMover) -> None:
    bench = Bench(mover)
    assert bench.store(*(bench.slots.transfer(slot, 8, 8 * slot) for slot in range(4))) == [True] * 4
    tickets = [bench.slots.transfer(slot, 8, 24 - 8 * slot) for slot in range(4)]
    if why == "a newer header":
        bench.slots.write(tickets[1].slot.header_offset, tickets[1].header._replace(generation=10**6).pack())
        expected = [True, False, True, True]
    else:
        late = bench.slots.slab_header[:8] + (10**6).to_bytes(8, "little") + bench.slots.slab_header[16:]
        bench.slots.write(0, late)
        expected = [False] * 4
    old = [bench.slots.payload_at(slot, 8) for slot in range(4)]
    before = bench.slots.read(0, bench.slots.slab.nbytes)
    assert bench.store(*tickets) == expected
    for slot, stored in enumerate(expected):
        assert (bench.slots.payload_at(slot, 8) == old[slot]) is not stored
    if not any(expected):
        assert bench.slots.read(0, bench.slots.slab.nbytes) == before


def test_what_befalls_a_slot_amid_a_load_is_found(mover: GpuMover, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer comes when the payload is in the ring; it has begun when the kernel reads the header again."""
    bench = Bench(mover)
    tickets = [bench.slots.transfer(slot, 8, 8 * slot) for slot in range(4)]
    assert bench.store(*tickets) == [True] * 4
    again = bench.slots.transfer(2, 8, 0)
    between(monkeypatch, mover, lambda: bench.slots.write(again.slot.header_offset, again.header.writing(WRITER).pack()))
    assert bench.load(*tickets) == [True, True, False, True]


def test_a_header_that_changes_amid_a_store_is_not_published(mover: GpuMover, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(mover)
    ticket = bench.slots.transfer(2, 8, 0)
    other = ticket.header._replace(generation=ticket.header.generation + 7).pack()
    seen: list[bytes] = []

    def change() -> None:
        seen.append(bench.slots.header_at(2))
        bench.slots.write(ticket.slot.header_offset, other)

    between(monkeypatch, mover, change)
    assert bench.store(ticket) == [False]
    assert seen == [ticket.header.writing(WRITER).pack()], "announced before the first byte"
    assert bench.slots.header_at(2) == other


def test_the_even_header_comes_after_the_copy(mover: GpuMover, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(mover)
    warm, ticket = bench.slots.transfer(1, 8, 0), bench.slots.transfer(2, 8, 0)
    assert bench.store(warm) == [True]
    ring = mover._rings[True]
    assert ring is not None
    seen: list[tuple[bytes, bool]] = []
    end = ring.end

    def look(batch: Any) -> None:
        before = bench.slots.payload_at(2, 8)
        end(batch)
        seen.append((bench.slots.header_at(2), before == bench.slots.payload_at(2, 8)))

    monkeypatch.setattr(ring, "end", look)
    assert bench.store(ticket) == [True]
    assert seen == [(ticket.header.writing(WRITER).pack(), False)]


@pytest.mark.parametrize(
    ("staging", "ring_from", "rings"),
    [
        (0, 0, {}),
        (8 * PAYLOAD, 4 * PAYLOAD + 1, {}),
        (4 * PAYLOAD, 0, {True: [1] * 4, False: [1] * 8}),
        (2 * PAYLOAD, 0, {True: [], False: []}),
    ],
)
def test_kernels_move_what_is_small_or_too_large_for_the_ring(
    staging: int, ring_from: int, rings: dict[bool, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(ringed(staging, ring_from=ring_from))
    tickets = [bench.slots.transfer(slot, 8, 8 * slot) for slot in range(4)]
    before = Model(bench.spec, ORDERS[0][0], bench.tensors)
    for store in (True, False):
        bench.mover._ring(SlotColumns.of(tickets), store)
    assert set(bench.mover._rings) == set(rings)
    counts = batches(bench.mover, monkeypatch)
    assert bench.store(*tickets) == [True] * 4
    assert counts == rings.get(True, [])
    for tensor in bench.tensors:
        tensor.view(torch.uint8).fill_(0)
    assert bench.load(*tickets) == [True] * 4
    assert counts == rings.get(False, [])
    assert before.equals(bench.tensors)


def test_without_memory_for_a_ring_kernels_move_everything_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(ringed())
    bench.mover.store(bench.cache, bench.mapping, [bench.slots.transfer(0, 8, 0)], WRITER)  # its table is there
    bench.mover._rings.clear()
    empty = torch.empty

    def refuse(size: Any, **options: Any) -> torch.Tensor:
        if size == 4 * PAYLOAD:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot. More advice")
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert bench.store(bench.slots.transfer(0, 8, 0)) == [True]
    assert [record.levelname for record in caplog.records if "VRAM" in record.getMessage()] == ["WARNING"]
    assert bench.mover._rings == {True: None}


def test_preparing_touches_neither_cache_nor_headers_and_takes_no_ring() -> None:
    bench = Bench(ringed())
    assert bench.untouched(lambda: bench.mover.prepare(bench.cache))
    assert bench.mover._rings == {}


def between(monkeypatch: pytest.MonkeyPatch, mover: GpuMover, action: Callable[[], Any]) -> None:
    """Run `action` before the next `move`: the request is announced, and its first batch copied if it is a load."""
    move = kernels.move
    mover._shapes.clear()  # launches remember their kernels
    left = [action]

    class Spy:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                while left:
                    left.pop()()
                move[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(kernels, "move", Spy())
    monkeypatch.setattr(mover, "_shapes", type(mover._shapes)())
