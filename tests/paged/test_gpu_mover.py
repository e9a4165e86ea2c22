"""The CUDA mover on a GPU: bytes against the naive model for VRAM and pinned host slots, and its behaviour on streams."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paged_world import MLA_ORDERS, ORDERS, WRITER, Case, Slots, bytes_of, make_spec, make_tensors, round_trip
from protocol_suite import SUITE, Bench

from vcache.config import TransferConfig
from vcache.errors import ArgumentError
from vcache.paged.gpu_mover import GpuMover
from vcache.paged.layout import PagedCache
from vcache.paged.mover import SlotTransfer
from vcache.paged.select import mover_for
from vcache.segment.mapping import MappedSlab

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SETTINGS = settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
LONG = 600_000_000
"""GPU cycles: about a third of a second."""


@dataclass
class CudaSlots(Slots):
    """The slab lies in VRAM."""

    @classmethod
    def make(cls, spec: Any, tokens: int, slots: int = 4, slab: MappedSlab | None = None) -> CudaSlots:
        memory = torch.zeros(cls.nbytes(spec, tokens, slots), dtype=torch.uint8, device="cuda")
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        address = memory.data_ptr()
        return cls(spec, tokens, slots, MappedSlab("cuda", uuid, len(memory), address, device_address=address, resource=memory))

    @property
    def memory(self) -> torch.Tensor:
        assert isinstance(self.slab.resource, torch.Tensor)
        return self.slab.resource

    def read(self, offset: int, nbytes: int) -> bytes:
        return self.memory[offset : offset + nbytes].cpu().numpy().tobytes()

    def write(self, offset: int, data: bytes) -> None:
        self.memory[offset : offset + len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def pinned_slots(spec: Any, tokens: int, slots: int = 4) -> Slots:
    """The slab lies in host memory that the GPU reaches."""
    memory = torch.zeros(Slots.nbytes(spec, tokens, slots), dtype=torch.uint8, pin_memory=True)
    address = memory.data_ptr()
    slab = MappedSlab("host", "host", len(memory), address, device_address=address, buffer=memory.numpy().data, resource=memory)
    return Slots(spec, tokens, slots, slab)


SLOTS: list[Callable[..., Slots]] = [CudaSlots.make, pinned_slots]


@pytest.fixture(scope="module")
def mover() -> Any:
    spec = make_spec()
    return mover_for(PagedCache.bind(make_tensors(spec, *ORDERS[0], 4, 4, device="cuda"), spec), TransferConfig())


@pytest.mark.parametrize("layout", ORDERS + MLA_ORDERS)
def test_every_layout_and_dtype(layout: tuple[str, str], mover: Any) -> None:
    for dtype, row_format in product(("bfloat16", "float8_e4m3fn", "float32"), ("planes", "fused")):
        if layout in MLA_ORDERS:
            row_format = "mla"
        spec = make_spec(dtype, heads=2, head_size=16, row_format=row_format)
        for make, mapping in zip([*SLOTS, CudaSlots.make], ("random", "blocks", "consecutive"), strict=True):
            case = Case(spec, layout, layout, 4, 4, (16, 16, 5), 3, 2, 0, mapping, 7)
            round_trip(case, mover, make(spec, 16, 3), "cuda")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float32"])
def test_odd_rows(dtype: str, mover: Any) -> None:
    for heads, head_size, layout in ((3, 5, ORDERS[1]), (1, 3, ORDERS[7]), (5, 24, ORDERS[0]), (3, 80, ORDERS[6])):
        spec = make_spec(dtype, 2, heads, head_size)
        for make in SLOTS:
            case = Case(spec, layout, layout, 8, 8, (40, 13), 3, 2, 1, "random", 7)
            round_trip(case, mover, make(spec, 40, 2), "cuda")


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_payloads_at_odd_addresses(shift: int, mover: Any) -> None:
    spec = make_spec()

    class Shifted(CudaSlots):
        def pinned(self, slot: int) -> Any:
            place = super().pinned(slot)
            return place._replace(payload_offset=place.payload_offset + shift)

    slots = Shifted.make(spec, 10, 2)
    slots.slots = 1
    round_trip(Case(spec, ORDERS[0], ORDERS[6], 4, 4, (9,), 1, 0, 0, "random", 3), mover, slots, "cuda")


@SETTINGS
@given(
    st.sampled_from(ORDERS),
    st.lists(st.integers(1, 70), min_size=1, max_size=4),
    st.integers(0, 70),
    st.integers(0, 9),
    st.sampled_from(("consecutive", "blocks", "random")),
    st.sampled_from((torch.int32, torch.int64)),
    st.sampled_from(SLOTS),
    st.sampled_from((0, 1, 7, 500)),
    st.integers(0, 1000),
)
def test_round_trip_equals_the_naive_model(
    layout: tuple[str, str],
    tokens: list[int],
    skip: int,
    offset: int,
    mapping: str,
    dtype: Any,
    make: Any,
    grid: int,
    seed: int,
) -> None:
    spec = make_spec("bfloat16", heads=2, head_size=64)
    case = Case(spec, layout, layout, 16, 16, tuple(tokens), skip, offset, 0, mapping, seed)
    cache = PagedCache.bind(make_tensors(spec, *layout, 4, 16, device="cuda"), spec, layout=layout[0])
    round_trip(case, mover_for(cache, TransferConfig(grid=grid)), make(spec, 70, 4), "cuda", dtype)


def test_instances_with_different_layouts_share_chunks(mover: Any) -> None:
    spec = make_spec(heads=2, head_size=16)
    for source, target in zip(ORDERS, ORDERS[5:] + ORDERS[:5], strict=True):
        round_trip(Case(spec, source, target, 4, 16, (16, 3), 2, 0, 0, "blocks", 1), mover, CudaSlots.make(spec, 16, 2), "cuda")


@pytest.mark.parametrize("make", SLOTS)
@pytest.mark.parametrize("rule", SUITE)
def test_protocol(rule: Callable[[Bench], None], make: Any, mover: Any) -> None:
    rule(Bench(mover, make(make_spec(), 8), "cuda"))


@pytest.mark.parametrize(("wrong", "count"), [(-1, 1), (32, 1), (2**40, 3)])
def test_slots_out_of_range_are_skipped_and_counted(wrong: int, count: int, mover: Any) -> None:
    bench = Bench(mover, CudaSlots.make(make_spec(), 8), "cuda")
    ticket, good = bench.slots.transfer(0, 8, 0), bench.slots.transfer(1, 8, 8)
    assert bench.store(ticket, good) == [True, True]
    bench.mapping = bench.mapping.clone()
    bench.mapping[2 : 2 + count] = wrong
    loaded = mover.load(bench.cache, bench.mapping, [ticket, good])
    with pytest.raises(ArgumentError, match=f"{count} slots are outside"):
        loaded.wait(30)
    assert loaded.verified() == [False, True]
    ticket = bench.slots.transfer(0, 8, 0)
    stored = mover.store(bench.cache, bench.mapping, [ticket], WRITER)
    with pytest.raises(ArgumentError, match="outside"):
        stored.wait()
    assert bench.slots.header_at(0) == ticket.header.writing(WRITER).pack()


@pytest.fixture
def no_device_wide_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("waited for the whole device")

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)


def test_store_comes_after_what_the_producer_queued(mover: Any, no_device_wide_wait: None) -> None:
    bench = Bench(mover, CudaSlots.make(make_spec(), 8), "cuda")
    expected = b"\x07" * bench.spec.payload_bytes(8)
    ticket = bench.slots.transfer(0, 8, 0)
    bench.tensors[0].view(torch.uint8).fill_(8)  # loading a kernel waits for the GPU: not below, where it sleeps
    producer = torch.cuda.Stream()
    producer.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(producer):
        torch.cuda._sleep(LONG)
        for tensor in bench.tensors:
            tensor.view(torch.uint8).fill_(7)
        stored = mover.store(bench.cache, bench.mapping, [ticket], WRITER)
    assert not stored.done()
    assert not stored.wait(0.01)
    with pytest.raises(ArgumentError, match="before it is done"):
        stored.verified()
    assert stored.wait(30)
    assert stored.verified() == [True]
    assert bench.slots.payload_at(0, 8) == expected


def test_a_stream_can_wait_for_a_load_without_the_host(mover: Any, no_device_wide_wait: None) -> None:
    bench = Bench(mover, CudaSlots.make(make_spec(), 8), "cuda")
    ticket = bench.slots.transfer(0, 8, 0)
    assert bench.store(ticket) == [True]
    before = [bytes_of(tensor) for tensor in bench.tensors]
    for tensor in bench.tensors:
        tensor.view(torch.uint8).fill_(0)
    caller, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    caller.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(caller):
        torch.cuda._sleep(LONG)
        loaded = mover.load(bench.cache, bench.mapping, [ticket])
    loaded.wait_stream(consumer)
    with torch.cuda.stream(consumer):
        copies = [tensor.clone() for tensor in bench.tensors]
    assert not loaded.done()
    consumer.synchronize()
    assert loaded.done()
    assert loaded.verified() == [True]
    for copy, old in zip(copies, before, strict=True):
        rows = copy.contiguous().view(torch.int16).cpu().numpy()
        assert (rows[:, :2] == old[:, :2]).all()
        assert not rows[:, 2:].any()


def test_one_call_mixes_vram_and_pinned_slots(mover: Any) -> None:
    spec = make_spec()
    bench = Bench(mover, CudaSlots.make(spec, 8), "cuda")
    host = pinned_slots(spec, 8)
    tickets: list[SlotTransfer] = [
        (host if number % 2 else bench.slots).transfer(number // 2, 8, 8 * number) for number in range(4)
    ]
    old = [bytes_of(tensor) for tensor in bench.tensors]
    assert bench.store(*tickets) == [True] * 4
    for tensor in bench.tensors:
        tensor.view(torch.uint8).fill_(0)
    assert bench.load(*tickets) == [True] * 4
    assert all((bytes_of(tensor) == before).all() for tensor, before in zip(bench.tensors, old, strict=True))


def test_preparing_touches_nothing(mover: Any) -> None:
    bench = Bench(mover, CudaSlots.make(make_spec(), 8), "cuda")
    assert bench.untouched(lambda: mover.prepare(bench.cache))


def test_threads_share_a_mover(mover: Any, no_device_wide_wait: None) -> None:
    spec = make_spec()
    failures: list[str] = []

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            slots = (CudaSlots.make, pinned_slots)[number % 2](spec, 16, 4)
            tensors = make_tensors(spec, *ORDERS[0], num_blocks=32, block_size=4, seed=number, device="cuda")
            cache = PagedCache.bind(tensors, spec)
            for turn in range(20):
                mapping = torch.randperm(64, generator=torch.Generator().manual_seed(turn)).cuda()
                tickets = [slots.transfer(slot, 16, 16 * slot) for slot in range(4)]
                stored = mover.store(cache, mapping, tickets, WRITER)
                loaded = mover.load(cache, mapping + 64, tickets) if stored.wait(30) else stored
                if not loaded.wait(30) or stored.verified() + loaded.verified() != [True] * 8:
                    failures.append(f"thread {number} turn {turn}: not verified")
                for tensor in tensors:
                    rows = tensor.flatten(1, 2)
                    if not torch.equal(rows[:, mapping].view(torch.int16), rows[:, mapping + 64].view(torch.int16)):
                        failures.append(f"thread {number} turn {turn}: other bytes")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert failures == []


def test_results_survive_the_reuse_of_their_table(mover: Any) -> None:
    bench = Bench(mover, CudaSlots.make(make_spec(), 8), "cuda")
    good, bad = bench.slots.transfer(0, 8, 0), bench.slots.transfer(1, 8, 0)
    assert bench.store(good) == [True]
    pairs = [[good, bad], [bad, good]]
    transfers = [mover.load(bench.cache, bench.mapping, pairs[turn % 2]) for turn in range(300)]
    assert transfers[-1].wait(30)
    assert [transfer.verified() for transfer in transfers] == [[True, False], [False, True]] * 150
    assert len(mover._lanes[False].tables._busy) < 300


# -- host memory through a ring ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ringed() -> Any:
    """Six chunks of `Bench` at a time on their way in, two on their way out."""
    mover = GpuMover(torch.device("cuda", 0), staging=8 * 1024, ring_from=0)
    spec = make_spec()
    mover.prepare(PagedCache.bind(make_tensors(spec, *ORDERS[0], 4, 4, device="cuda"), spec))
    return mover


@pytest.mark.parametrize("rule", SUITE)
def test_protocol_through_a_ring(rule: Callable[[Bench], None], ringed: Any) -> None:
    rule(Bench(ringed, pinned_slots(make_spec(), 8), "cuda"))
    assert ringed._rings


@pytest.mark.parametrize("layout", ORDERS + MLA_ORDERS)
def test_every_layout_through_a_ring(layout: tuple[str, str]) -> None:
    row_format = "mla" if layout in MLA_ORDERS else "planes"
    spec = make_spec("bfloat16", heads=2, head_size=16, row_format=row_format)
    most = -(-spec.payload_bytes(16) // 256) * 256
    mover = GpuMover(torch.device("cuda", 0), staging=8 * most, ring_from=0)
    case = Case(spec, layout, layout, 4, 4, (16, 16, 5, 16, 16, 1, 16), 3, 2, 0, "random", 7)
    round_trip(case, mover, pinned_slots(spec, 16, 7), "cuda")
    assert set(mover._rings) == {True, False}


def test_requests_larger_than_the_ring_follow_each_other_without_the_host(no_device_wide_wait: None) -> None:
    """Dozens of batches in flight, of several requests, while the caller's stream sleeps."""
    spec = make_spec("bfloat16", layers=4, heads=4, head_size=64)
    tokens, chunks = 64, 48
    tensors = make_tensors(spec, *ORDERS[0], num_blocks=2 * tokens * chunks // 16, block_size=16, device="cuda")
    cache = PagedCache.bind(tensors, spec)
    mover = GpuMover(torch.device("cuda", 0), staging=16 * spec.payload_bytes(tokens), ring_from=0)
    slots = pinned_slots(spec, tokens, chunks)
    mapping = torch.randperm(tokens * chunks, generator=torch.Generator().manual_seed(3)).cuda()
    there = tokens * chunks + torch.randperm(tokens * chunks, generator=torch.Generator().manual_seed(4)).cuda()
    for _ in range(2):
        tickets = [slots.transfer(slot, tokens, tokens * slot) for slot in range(chunks)]
        stored = mover.store(cache, mapping, tickets, WRITER)
        assert stored.wait(30)
        assert stored.verified() == [True] * chunks
    for tensor in tensors:
        tensor.flatten(1, 2)[:, tokens * chunks :].zero_()
    halves = [tickets[: chunks // 2], tickets[chunks // 2 :]]
    mover.load(cache, there, tickets[:1]).wait(30)
    caller = torch.cuda.Stream()
    caller.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(caller):
        torch.cuda._sleep(LONG)
        loads = [mover.load(cache, there, half) for half in halves]
    assert not loads[-1].done()
    for load, half in zip(loads, halves, strict=True):
        assert load.wait(30)
        assert load.verified() == [True] * len(half)
    for tensor in tensors:
        rows = tensor.flatten(1, 2).view(torch.int16)
        assert torch.equal(rows[:, mapping], rows[:, there])


def test_a_host_slot_rewritten_while_a_load_is_in_flight_is_found(ringed: Any, no_device_wide_wait: None) -> None:
    """Its payload is in the ring by then; the scatter waits for the caller's stream."""
    bench = Bench(ringed, pinned_slots(make_spec(), 8), "cuda")
    tickets = [bench.slots.transfer(slot, 8, 8 * slot) for slot in range(4)]
    assert bench.store(*tickets) == [True] * 4
    assert bench.load(*tickets) == [True] * 4
    before = [bytes_of(tensor) for tensor in bench.tensors]
    caller = torch.cuda.Stream()
    caller.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(caller):
        torch.cuda._sleep(LONG)
        loaded = ringed.load(bench.cache, bench.mapping, tickets)
    again = bench.slots.transfer(1, 8, 0)
    bench.slots.write(again.slot.header_offset, again.header.writing(WRITER).pack())
    bench.slots.write(again.slot.payload_offset, bytes(again.header.payload_bytes))
    bench.slots.write(again.slot.header_offset, again.header.pack())
    assert not loaded.done(), "the test was too slow"
    assert loaded.wait(30)
    assert loaded.verified() == [True, False, True, True]
    assert all((bytes_of(tensor) == old).all() for tensor, old in zip(bench.tensors, before, strict=True))


def test_a_refused_host_slot_keeps_its_bytes(ringed: Any) -> None:
    bench = Bench(ringed, pinned_slots(make_spec(), 8), "cuda")
    assert bench.store(*(bench.slots.transfer(slot, 8, 8 * slot) for slot in range(4))) == [True] * 4
    tickets = [bench.slots.transfer(slot, 8, 24 - 8 * slot) for slot in range(4)]
    bench.slots.write(tickets[1].slot.header_offset, tickets[1].header._replace(generation=10**6).pack())
    old = [bench.slots.payload_at(slot, 8) for slot in range(4)]
    assert bench.store(*tickets) == [True, False, True, True]
    assert [bench.slots.payload_at(slot, 8) == old[slot] for slot in range(4)] == [False, True, False, False]


def test_one_call_mixes_vram_and_a_ring(ringed: Any) -> None:
    spec = make_spec()
    bench = Bench(ringed, CudaSlots.make(spec, 8), "cuda")
    host = pinned_slots(spec, 8)
    tickets = [(host if number % 2 else bench.slots).transfer(number // 2, 8, 8 * number) for number in range(4)]
    old = [bytes_of(tensor) for tensor in bench.tensors]
    assert bench.store(*tickets) == [True] * 4
    for tensor in bench.tensors:
        tensor.view(torch.uint8).fill_(0)
    assert bench.load(*tickets) == [True] * 4
    assert all((bytes_of(tensor) == before).all() for tensor, before in zip(bench.tensors, old, strict=True))
    tickets[2] = tickets[2]._replace(header=tickets[2].header._replace(generation=500))
    assert bench.load(*tickets) == [True, True, False, True]
