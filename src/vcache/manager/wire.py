"""Bytes between the manager and its clients. Pure functions and one incremental parser; no sockets.

Frame, little endian:  u32 length of what follows | u32 request id | u8 verb or status | payload

    verb HELLO    magic, u16 version | msgpack Hello          the first frame of a connection; readable by every version
    verb LOOKUP   n x 16-byte key                             reply: u32 count
    verb ACQUIRE  u64 lease, u16 shard | n x 16-byte key      reply: u64 lease, f64 expires_in | n x 24-byte location
    verb RELEASE  u64 lease                                   no reply
    verb CALL     msgpack, one of `Request`                   reply: msgpack, type as the `*_REPLY` decoders say
    status OK     the reply to request id
    status ERROR  u8 kind | UTF-8 text                        request id 0: about the connection, which then closes
    status PUSH   msgpack `Push`, request id 0

Packed verbs are the hot path; everything else is a typed struct. Whatever does not parse raises `ProtocolError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Annotated, NamedTuple, TypeVar

import msgspec

from ..errors import ArgumentError, ManagerRefusedError, ProtocolError, SegmentError, VCacheError
from ..keys import DIGEST_BYTES
from ..segment.slots import LOCATION_BYTES, SegmentInfo, SlabInfo, SlabInventory, SlotLocation
from .api import (
    PROTOCOL_VERSION,
    AcquireReply,
    GateReport,
    GateWriter,
    MovePlan,
    Push,
    PutGrant,
    PutRequest,
    Role,
    SessionInfo,
    SpillPlan,
    StatsReply,
    Ticket,
)

T = TypeVar("T")

HELLO, LOOKUP, ACQUIRE, RELEASE, CALL = 1, 2, 3, 4, 5
OK, ERROR, PUSH = 128, 129, 130

WIPE_TIMEOUT = 2.0
"""Seconds that the manager waits for lenders before it answers `remove` and `clear`."""

HEADER_BYTES = 9
_LENGTH_BYTES = 4
_HEADER = struct.Struct("<IIB")
_HELLO = struct.Struct("<4sH")
_HELLO_MAGIC = b"VCMG"
_COUNT = struct.Struct("<I")
_LEASE = struct.Struct("<Q")
_ACQUIRE = struct.Struct("<QH")
_ACQUIRED = struct.Struct("<Qd")
_DIGEST_LENGTHS = frozenset({DIGEST_BYTES})
_BATCH = 1024
"""Keys unpacked by one cached format."""

Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Id = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Size = Annotated[int, msgspec.Meta(ge=0, lt=2**48)]
"""Bytes of a segment or slab: anything larger is a mistake, not memory."""
Name = Annotated[str, msgspec.Meta(max_length=256)]
Avoid = Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]], msgspec.Meta(max_length=2**16)]
"""Numbers of segments."""


class Hello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Opens a connection. Says at once: this client has no unfinished writes."""

    client: Id
    name: Name
    role: Role
    token: Annotated[bytes, msgspec.Meta(max_length=4096)] = b""
    host: Name = ""
    """`SegmentInfo.host` of the client's host. Empty: it is shown every chunk, wherever it lies."""
    remote: bool = False
    """Whether it reads memory of other hosts by transfer engine."""

    def __repr__(self) -> str:
        return f"Hello(client={self.client.hex()}, name={self.name!r}, role={self.role!r}, host={self.host!r})"


class HelloReply(msgspec.Struct, frozen=True):
    session: SessionInfo
    max_frame: int
    """Bytes of the largest frame this manager accepts."""


class _Request(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    pass


class PutStart(_Request, frozen=True):
    request: PutRequest


class PutEnd(_Request, frozen=True):
    tickets: list[Ticket]


class PutRevoke(_Request, frozen=True):
    tickets: list[Ticket]


class Demote(_Request, frozen=True):
    nbytes: Size
    avoid: Avoid


class PlanSpill(_Request, frozen=True):
    nbytes: Size
    avoid: Avoid


class Spilled(_Request, frozen=True):
    lease: Annotated[int, msgspec.Meta(ge=0)]
    keys: list[Digest]


class Tiers(_Request, frozen=True):
    keys: list[Digest]


class Remove(_Request, frozen=True):
    keys: list[Digest]


class Clear(_Request, frozen=True):
    namespace: Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES)] = b""


class InventoryPart(_Request, frozen=True):
    """Part of an inventory too large for one frame; used up by the next `Mount` of that segment on this connection."""

    uuid: Id
    slabs: list[SlabInventory]


class Mount(_Request, frozen=True):
    info: SegmentInfo
    inventory: list[SlabInventory]
    gate: GateReport


class WritersLeft(_Request, frozen=True):
    uuid: Id
    writers: list[GateWriter]


class Unmount(_Request, frozen=True):
    uuid: Id


class AddSlabs(_Request, frozen=True):
    uuid: Id
    slabs: list[SlabInfo]


class DropSlabs(_Request, frozen=True):
    uuid: Id
    nbytes: Size


class ImporterGone(_Request, frozen=True):
    uuid: Id
    client: Id


class RequestResize(_Request, frozen=True):
    uuid: Id
    nbytes: Size


class Wiped(_Request, frozen=True):
    token: int


class Segments(_Request, frozen=True):
    pass


class Stats(_Request, frozen=True):
    pass


class Heartbeat(_Request, frozen=True):
    pass


class Goodbye(_Request, frozen=True):
    """Ends the session as `Hello` starts it: no unfinished writes."""


Request = (
    PutStart
    | PutEnd
    | PutRevoke
    | Demote
    | PlanSpill
    | Spilled
    | Tiers
    | Remove
    | Clear
    | InventoryPart
    | Mount
    | WritersLeft
    | Unmount
    | AddSlabs
    | DropSlabs
    | ImporterGone
    | RequestResize
    | Wiped
    | Segments
    | Stats
    | Heartbeat
    | Goodbye
)

_ENCODER = msgspec.msgpack.Encoder()
_REQUEST: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_HELLO_BODY = msgspec.msgpack.Decoder(Hello)
_PUSH: msgspec.msgpack.Decoder[Push] = msgspec.msgpack.Decoder(Push)

HELLO_REPLY = msgspec.msgpack.Decoder(HelloReply)
GRANTS_REPLY = msgspec.msgpack.Decoder(list[PutGrant])
MOVE_PLAN_REPLY = msgspec.msgpack.Decoder(MovePlan)
SPILL_PLAN_REPLY = msgspec.msgpack.Decoder(SpillPlan)
FLAGS_REPLY = msgspec.msgpack.Decoder(list[bool])
NUMBERS_REPLY = msgspec.msgpack.Decoder(list[int])
NUMBER_REPLY = msgspec.msgpack.Decoder(int)
NOTHING_REPLY = msgspec.msgpack.Decoder(type(None))
SEGMENTS_REPLY = msgspec.msgpack.Decoder(list[SegmentInfo])
STATS_REPLY = msgspec.msgpack.Decoder(StatsReply)

# Which exceptions cross the wire as what they are; any other becomes the first.
_ERROR_KINDS: tuple[type[VCacheError], ...] = (ManagerRefusedError, ProtocolError, ArgumentError, SegmentError)


class Frame(NamedTuple):
    request: int
    """0 for pushes and for errors about the connection."""
    code: int
    """Verb or status."""
    payload: bytes | bytearray


class FrameBuffer:
    """Cuts a byte stream into frames. Holds at most one frame and one read; a length is judged before its bytes are kept."""

    def __init__(self, max_frame: int) -> None:
        """`max_frame`: bytes of the largest frame accepted, header included. May be changed between frames."""
        self.max_frame = max_frame
        self._data: bytes | bytearray = b""
        self._start = 0

    def __len__(self) -> int:
        """Bytes received and not yet given out."""
        return len(self._data) - self._start

    def feed(self, data: bytes) -> None:
        if self._start == len(self._data):
            self._data = data  # The usual case: whole frames, parsed where they are.
        elif isinstance(self._data, bytearray):
            del self._data[: self._start]
            self._data += data
        else:
            self._data = bytearray(memoryview(self._data)[self._start :])
            self._data += data
        self._start = 0

    def frames(self) -> Iterator[Frame]:
        """The complete frames, in order. May be abandoned and called again. Raises `ProtocolError` on an impossible length."""
        while True:
            data, start = self._data, self._start
            have = len(data) - start
            if have < _LENGTH_BYTES:
                if not have:
                    self._data, self._start = b"", 0
                return
            if have < HEADER_BYTES:
                length, request, code = int.from_bytes(data[start : start + _LENGTH_BYTES], "little"), 0, 0
            else:
                length, request, code = _HEADER.unpack_from(data, start)
            total = length + _LENGTH_BYTES
            if total > self.max_frame or total < HEADER_BYTES:
                limits = f"{HEADER_BYTES}..{self.max_frame}"
                raise ProtocolError(f"frame of {total} bytes; expected {limits} (manager.max_frame)")
            if have < total:
                return
            self._start = start + total
            yield Frame(request, code, data[start + HEADER_BYTES : start + total])


def frame(request: int, code: int, payload: bytes | bytearray = b"") -> bytes:
    """One frame. `request`: u32."""
    return _HEADER.pack(HEADER_BYTES - _LENGTH_BYTES + len(payload), request, code) + payload


# -- requests ----------------------------------------------------------------------------------------------------------


def encode_hello(hello: Hello, version: int = PROTOCOL_VERSION) -> bytes:
    """Payload of HELLO."""
    return _HELLO.pack(_HELLO_MAGIC, version) + _ENCODER.encode(hello)


def decode_hello(payload: bytes | bytearray) -> Hello:
    """Raises `ProtocolError`; for another version its text names both."""
    if len(payload) < _HELLO.size:
        raise ProtocolError("not a hello")
    magic, version = _HELLO.unpack_from(payload)
    if magic != _HELLO_MAGIC:
        raise ProtocolError("not a hello")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the client speaks protocol version {version}, the manager speaks version {PROTOCOL_VERSION}; "
            "install the same release of vcache on both sides"
        )
    return decode_value(_HELLO_BODY, payload[_HELLO.size :])


def encode_request(request: Request) -> bytes:
    """Payload of CALL."""
    return _ENCODER.encode(request)


def decode_request(payload: bytes | bytearray) -> Request:
    return decode_value(_REQUEST, payload)


def join_keys(keys: Sequence[bytes]) -> bytes:
    """Payload of LOOKUP. Raises `ArgumentError` unless every key has 16 bytes."""
    if not _DIGEST_LENGTHS.issuperset(map(len, keys)):
        raise ArgumentError(f"keys: every key must be {DIGEST_BYTES} bytes")
    return b"".join(keys)


@lru_cache(maxsize=_BATCH)
def _keys_format(count: int) -> struct.Struct:
    return struct.Struct(f"{DIGEST_BYTES}s" * count)


def split_keys(payload: bytes | bytearray, offset: int = 0) -> Sequence[bytes]:
    """The keys that follow `offset`. One unpack with a cached format is several times as fast as slicing."""
    count, rest = divmod(len(payload) - offset, DIGEST_BYTES)
    if rest or count < 0:
        raise ProtocolError(f"keys: {len(payload) - offset} bytes are no multiple of {DIGEST_BYTES}")
    if count <= _BATCH:
        keys: tuple[bytes, ...] = _keys_format(count).unpack_from(payload, offset)
        return keys
    return [key for start in range(0, count, _BATCH) for key in _batch(payload, offset + start * DIGEST_BYTES, count - start)]


def _batch(payload: bytes | bytearray, offset: int, left: int) -> tuple[bytes, ...]:
    return _keys_format(min(left, _BATCH)).unpack_from(payload, offset)


def encode_acquire(keys: bytes, shard: int = 0, lease: int = 0) -> bytes:
    """Payload of ACQUIRE; `keys` as `join_keys` gives them. Raises `ArgumentError` for a shard beyond 16 bits."""
    try:
        return _ACQUIRE.pack(lease, shard) + keys
    except struct.error:
        raise ArgumentError(f"acquire: shard {shard} or lease {lease} is out of range") from None


class AcquireRequest(NamedTuple):
    lease: int
    shard: int
    keys: Sequence[bytes]


def decode_acquire(payload: bytes | bytearray) -> AcquireRequest:
    if len(payload) < _ACQUIRE.size:
        raise ProtocolError(f"acquire: {len(payload)} bytes are too few")
    lease, shard = _ACQUIRE.unpack_from(payload)
    return AcquireRequest(lease, shard, split_keys(payload, _ACQUIRE.size))


def encode_lease(lease: int) -> bytes:
    """Payload of RELEASE."""
    return _LEASE.pack(lease)


def decode_lease(payload: bytes | bytearray) -> int:
    if len(payload) != _LEASE.size:
        raise ProtocolError(f"release: expected {_LEASE.size} bytes, got {len(payload)}")
    return int(_LEASE.unpack(payload)[0])


# -- replies -----------------------------------------------------------------------------------------------------------


def encode_reply(value: object) -> bytes:
    """Payload of the OK reply to HELLO and CALL."""
    return _ENCODER.encode(value)


def encode_count(count: int) -> bytes:
    """Payload of the OK reply to LOOKUP."""
    return _COUNT.pack(count)


def decode_count(payload: bytes | bytearray) -> int:
    if len(payload) != _COUNT.size:
        raise ProtocolError(f"lookup reply: expected {_COUNT.size} bytes, got {len(payload)}")
    return int(_COUNT.unpack(payload)[0])


def encode_acquired(lease: int, expires_in: float, locations: bytes) -> bytes:
    """Payload of the OK reply to ACQUIRE; `locations` joined as `SlotLocation.pack` makes them."""
    return _ACQUIRED.pack(lease, expires_in) + locations


def decode_acquired(payload: bytes | bytearray) -> AcquireReply:
    if len(payload) < _ACQUIRED.size or (len(payload) - _ACQUIRED.size) % LOCATION_BYTES:
        raise ProtocolError(f"acquire reply: {len(payload)} bytes do not hold whole locations")
    lease, expires_in = _ACQUIRED.unpack_from(payload)
    return AcquireReply(lease, expires_in, SlotLocation.unpack_many(memoryview(payload)[_ACQUIRED.size :]))


def encode_push(push: Push) -> bytes:
    """Payload of PUSH."""
    return _ENCODER.encode(push)


def decode_push(payload: bytes | bytearray) -> Push:
    return decode_value(_PUSH, payload)


def encode_error(error: Exception) -> bytes:
    """Payload of ERROR. The text is all that the other side learns."""
    kind = next((i for i, known in enumerate(_ERROR_KINDS) if isinstance(error, known)), 0)
    return bytes((kind,)) + str(error).encode()


def decode_error(payload: bytes | bytearray) -> VCacheError:
    """The exception to raise at the caller."""
    kind = payload[0] if payload else 0
    known = _ERROR_KINDS[kind] if kind < len(_ERROR_KINDS) else ManagerRefusedError
    return known(bytes(payload[1:]).decode(errors="replace"))


def decode_value(decoder: msgspec.msgpack.Decoder[T], payload: bytes | bytearray) -> T:
    """Decode a typed value. Raises `ProtocolError` when the payload is none."""
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"payload: {' '.join(str(error).split())}") from None
