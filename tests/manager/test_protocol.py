"""The bytes on the wire: pinned formats, any cut of the stream, and nothing but `ProtocolError` for what is no message."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcache.errors import ArgumentError, ManagerRefusedError, ProtocolError, SegmentError, StorageError
from vcache.manager import wire
from vcache.manager.api import (
    PROTOCOL_VERSION,
    Acquire,
    AcquireReply,
    AddSlabs,
    Clear,
    Demote,
    DropSlabs,
    GateReport,
    GateWriter,
    Goodbye,
    Heartbeat,
    ImporterGone,
    InventoryPart,
    Lookup,
    Mount,
    Move,
    MovePlan,
    PlanSpill,
    Promote,
    PromotionWanted,
    Push,
    PutEnd,
    PutGrant,
    PutRequest,
    PutRevoke,
    PutStart,
    Release,
    Remove,
    RequestResize,
    ResizeRequested,
    RoomWanted,
    SegmentGone,
    SegmentMounted,
    Segments,
    Spill,
    Spilled,
    SpillPlan,
    Stats,
    Story,
    Ticket,
    Tiers,
    UndoneSlots,
    Unmount,
    Verb,
    Wiped,
    WipeSlots,
    WritersLeft,
)
from vcache.segment.slots import SegmentInfo, SlabInfo, SlabInventory, SlotLocation

LIMIT = 1 << 16


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


HELLO = wire.Hello(b"c" * 16, "engine-0", "engine", b"secret", "a host", True)
INFO = SegmentInfo(
    uuid=b"u" * 16,
    kind="host",
    host="h",
    device="host",
    broker="/b",
    owner=b"o" * 16,
    slabs=(SlabInfo(0, 4096, 2**47),),
    endpoint="h:1",
)
PUT = PutRequest(keys=[key(1)], namespace=b"n" * 16, parent=b"", first_index=0, tokens=[256], slot_bytes=4096)
REQUESTS: list[Verb[Any]] = [
    Lookup((key(1), key(2))),
    Acquire((key(1), key(2)), 3, 5),
    Release(9),
    PutStart(PUT),
    PutEnd([Ticket(key(1), 0, 8)]),
    PutRevoke([Ticket(key(1), 0, 8)]),
    Tiers([key(1), key(2)]),
    Remove([key(1)]),
    Clear(b"n" * 16),
    InventoryPart(b"u" * 16, [SlabInventory(0, b"s" * 64, b"h" * 128)]),
    Mount(INFO, [SlabInventory(0, b"s" * 64, b"")], GateReport(fence=7, writers=(GateWriter(b"w" * 16, 0),), floor=5)),
    WritersLeft(b"u" * 16, [GateWriter(b"w" * 16, 0)], [UndoneSlots(0, 3, 2)]),
    Unmount(b"u" * 16),
    AddSlabs(b"u" * 16, [SlabInfo(3, 4096, 2**47)]),
    Demote(4096, [1, 2]),
    Promote(4096, [1, 2]),
    PlanSpill(4096, []),
    Spilled(7, [key(1)]),
    DropSlabs(b"u" * 16, 4096),
    ImporterGone(b"u" * 16, b"c" * 16),
    RequestResize(b"u" * 16, 4096),
    Wiped(7),
    Segments(),
    Stats(),
    Story(key(1)),
    Heartbeat(),
    Goodbye(),
]


CALLS = [verb for verb in REQUESTS if wire.encode_verb(verb)[0] == wire.CALL]


def decode(code: int, payload: bytes | bytearray) -> Verb[Any]:
    return wire.CODECS[code].decode(payload)


def decode_call(payload: bytes | bytearray) -> Verb[Any]:
    return decode(wire.CALL, payload)


def round_trip(verb: Verb[Any], reply: object) -> Any:
    return wire.decode_reply(verb, wire.CODECS[wire.CALL].encode_reply(reply))


def test_hot_frames_are_pinned() -> None:
    keys = key(1) + key(2)
    assert wire.frame(7, wire.LOOKUP, keys) == struct.pack("<IIB", 37, 7, 2) + keys
    assert wire.encode_acquire(keys, shard=3, lease=5) == struct.pack("<QH", 5, 3) + keys
    assert wire.encode_lease(9) == struct.pack("<Q", 9)
    assert wire.encode_acquired(9, 30.0, b"l" * 24) == struct.pack("<Qd", 9, 30.0) + b"l" * 24
    assert wire.encode_hello(HELLO)[:6] == b"VCMG" + struct.pack("<H", PROTOCOL_VERSION)


def test_hot_codecs_round_trip() -> None:
    keys = [key(i) for i in range(5)]
    assert wire.decode_acquire(wire.encode_acquire(wire.join_keys(keys), 3, 5)) == Acquire(
        tuple(keys), 3, 5, wire.encode_acquire(wire.join_keys(keys), 3, 5)
    )
    locations = [SlotLocation(1, 2, 256, 3, 4096, 8), SlotLocation(1, 2, 17, 4, 4096, 10)]
    reply = wire.decode_acquired(wire.encode_acquired(5, 1.5, b"".join(at.pack() for at in locations)))
    assert reply == AcquireReply(5, 1.5, locations)
    assert wire.decode_lease(wire.encode_lease(2**64 - 1)) == 2**64 - 1
    assert wire.decode_count(wire.encode_count(12)) == 12


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 5000])
def test_keys_split_at_any_count(count: int) -> None:
    keys = [key(i) for i in range(count)]
    assert list(wire.split_keys(b"xx" + wire.join_keys(keys), 2)) == keys


def test_keys_of_other_lengths_are_refused() -> None:
    with pytest.raises(ArgumentError, match="16 bytes"):
        wire.join_keys([b"x" * 15, b"x" * 17])
    with pytest.raises(ProtocolError, match="multiple of 16"):
        wire.split_keys(b"x" * 17)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_typed_requests_round_trip(request_: Verb[Any]) -> None:
    there = decode(*wire.encode_verb(request_))
    if isinstance(there, Lookup | Acquire):
        there = msgspec.structs.replace(there, payload=b"")
    assert there == request_


@pytest.mark.parametrize(
    "push",
    [
        SegmentMounted(INFO),
        SegmentGone(1, b"u" * 16),
        WipeSlots(3, b"u" * 16, [(0, 64)]),
        ResizeRequested(b"u" * 16, 4096),
        RoomWanted(),
        PromotionWanted(),
    ],
)
def test_pushes_round_trip(push: Push) -> None:
    assert wire.decode_push(wire.encode_push(push)) == push


def test_typed_replies_round_trip() -> None:
    grants = [PutGrant("exists"), PutGrant("granted", SlotLocation(1, 0, 256, 2, 4096, 8), 6, 12)]
    assert round_trip(PutStart(PUT), grants) == grants
    with pytest.raises(ProtocolError):
        round_trip(PutStart(PUT), [1])
    source = SlotLocation(1, 0, 256, 2, 4096, 8)
    moves = MovePlan(lease=3, moves=[Move(key(1), 1, source, grants[1])])
    assert round_trip(Demote(1, []), moves) == moves
    assert round_trip(Promote(1, []), moves) == moves
    spills = SpillPlan(lease=3, spills=[Spill(key(1), 0, source), Spill(key(1), 1, source)])
    assert round_trip(PlanSpill(1, []), spills) == spills


@pytest.mark.parametrize(
    "body",
    [
        ["NoSuchVerb"],
        ["Wiped", 7, "one field too many"],
        ["Wiped"],
        ["Wiped", "seven"],
        ["Tiers", [b"short"]],
        ["Unmount", b"short"],
        ["DropSlabs", b"u" * 16, -1],
        ["AddSlabs", b"u" * 16, [[0, "large"]]],
        ["Demote", -1, []],
        ["Demote", 2**60, []],
        ["Demote", 1, [-1]],
        ["Demote", 1, [2**32]],
        ["Promote", -1, []],
        ["Promote", 1, [2**32]],
        ["PlanSpill", 1, [0] * (2**16 + 1)],
        ["Spilled", -1, []],
        ["Spilled", 0, [b"short"]],
        ["PutStart", {"keys": []}],
        ["PutStart", {**msgspec.to_builtins(PUT, builtin_types=(bytes,)), "unknown": 1}],
        {"type": "Stats"},
        None,
    ],
)
def test_wrong_requests_are_refused(body: object) -> None:
    with pytest.raises(ProtocolError):
        decode_call(msgspec.msgpack.encode(body))


def test_hello_of_another_version_names_both() -> None:
    assert wire.decode_hello(wire.encode_hello(HELLO)) == HELLO
    with pytest.raises(ProtocolError, match=rf"version 9.*version {PROTOCOL_VERSION}.*install"):
        wire.decode_hello(wire.encode_hello(HELLO, version=9))
    with pytest.raises(ProtocolError, match="version 9"):
        wire.decode_hello(b"VCMG" + struct.pack("<H", 9) + b"a body that only version 9 can read")


def test_hello_hides_its_token() -> None:
    assert "secret" not in repr(HELLO)
    assert "secret" not in str(HELLO)


def test_errors_arrive_as_what_they_were() -> None:
    for error in (ManagerRefusedError("no"), ProtocolError("what"), ArgumentError("keys"), SegmentError("slab")):
        there = wire.decode_error(wire.encode_error(error))
        assert (type(there), str(there)) == (type(error), str(error))
    assert type(wire.decode_error(wire.encode_error(StorageError("x")))) is ManagerRefusedError
    assert type(wire.decode_error(b"\xff\xff\xff")) is ManagerRefusedError
    assert type(wire.decode_error(b"")) is ManagerRefusedError


frames_strategy = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255), st.binary(max_size=64)), max_size=12)


@given(frames=frames_strategy, cuts=st.lists(st.integers(1, 40), min_size=1, max_size=40), take=st.integers(1, 3))
def test_any_cut_of_the_stream_gives_the_same_frames(frames: list[tuple[int, int, bytes]], cuts: list[int], take: int) -> None:
    stream = b"".join(wire.frame(*each) for each in frames)
    buffer = wire.FrameBuffer(LIMIT)
    received = []
    turn = 0
    while stream:
        size = cuts[turn % len(cuts)]
        turn += 1
        buffer.feed(stream[:size])
        stream = stream[size:]
        for seen, each in enumerate(buffer.frames(), start=1):
            received.append((each.request, each.code, bytes(each.payload)))
            if seen == take:
                break  # Abandoned half way: the rest comes with the next call.
    received += [(each.request, each.code, bytes(each.payload)) for each in buffer.frames()]
    assert received == frames
    assert len(buffer) == 0


@pytest.mark.parametrize("length", [0, 4, LIMIT, 2**31, 2**32 - 1])
def test_impossible_lengths_are_refused_before_the_body(length: int) -> None:
    buffer = wire.FrameBuffer(LIMIT)
    buffer.feed(wire.frame(1, wire.LOOKUP, key(1)) + struct.pack("<I", length))
    stream = buffer.frames()
    assert next(stream).payload == key(1), "frames before it are still good"
    with pytest.raises(ProtocolError, match="max_frame"):
        next(stream)


def test_largest_frame_passes() -> None:
    buffer = wire.FrameBuffer(64)
    buffer.feed(wire.frame(1, wire.LOOKUP, b"x" * 55))
    assert [len(each.payload) for each in buffer.frames()] == [55]
    buffer.feed(wire.frame(1, wire.LOOKUP, b"x" * 56))
    with pytest.raises(ProtocolError):
        next(buffer.frames())


DECODERS: list[Callable[[bytes], object]] = [
    wire.decode_hello,
    decode_call,
    wire.decode_acquire,
    wire.decode_lease,
    wire.decode_count,
    wire.decode_acquired,
    wire.decode_push,
    wire.split_keys,
    lambda raw: wire.decode_reply(Stats(), raw),
    lambda raw: wire.decode_hello(b"VCMG\x01\x00" + raw),
]


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=200))
def test_random_payloads_raise_nothing_but_protocol_errors(raw: bytes) -> None:
    for decode in DECODERS:
        with suppress(ProtocolError):
            decode(raw)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_requests_raise_nothing_but_protocol_errors(data: st.DataObject) -> None:
    raw = bytearray(wire.encode_verb(data.draw(st.sampled_from(CALLS)))[1])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        decode_call(raw[: data.draw(st.integers(0, len(raw)))])


def test_deep_nesting_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        decode_call(b"\x92\xa5Wiped" + b"\x91" * 100_000 + b"\x01")
    with pytest.raises(ProtocolError):
        decode_call(b"\x92\xa8PutStart\x81\xa1x" + b"\x91" * 100_000 + b"\x01")
