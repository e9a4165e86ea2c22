"""Bytes between the manager and its clients. Pure functions and one incremental parser; no sockets.

Frame, little endian:  u32 length of what follows | u32 request id | u8 verb or status | payload

    verb HELLO    magic, u16 version | msgpack Hello          the first frame of a connection; readable by every version
    verb LOOKUP   n x 16-byte key                             reply: u32 count
    verb ACQUIRE  u64 lease, u16 shard | n x 16-byte key      reply: u64 lease, f64 expires_in | n x 24-byte location
    verb RELEASE  u64 lease                                   no reply
    verb CALL     msgpack, any other `Verb`                   reply: msgpack, of the type that the verb is a `Verb` of
    status OK     the reply to request id
    status ERROR  u8 kind | UTF-8 text                        request id 0: about the connection, which then closes
    status PUSH   msgpack `Push`, request id 0

Packed verbs are the hot path; everything else is a typed struct. Whatever does not parse raises `ProtocolError`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial, reduce
from operator import or_
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

import msgspec

from ..errors import ArgumentError, ManagerRefusedError, ProtocolError, SegmentError, VCacheError
from ..keys import DIGEST_BYTES
from ..segment.slots import LOCATION_BYTES, Locations, SlabInventory
from .api import (
    PROTOCOL_VERSION,
    Acquire,
    AcquireReply,
    Id,
    InventoryPart,
    Lookup,
    Mount,
    Push,
    Release,
    Role,
    SessionInfo,
    Verb,
)

R = TypeVar("R")
T = TypeVar("T")

HELLO, LOOKUP, ACQUIRE, RELEASE, CALL = 1, 2, 3, 4, 5
OK, ERROR, PUSH = 128, 129, 130

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

Name = Annotated[str, msgspec.Meta(max_length=256)]


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


_ENCODER = msgspec.msgpack.Encoder()
_HELLO_BODY = msgspec.msgpack.Decoder(Hello)
_HELLO_REPLY = msgspec.msgpack.Decoder(HelloReply)
_PUSH: msgspec.msgpack.Decoder[Push] = msgspec.msgpack.Decoder(Push)

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


def decode_acquire(payload: bytes | bytearray) -> Acquire:
    if len(payload) < _ACQUIRE.size:
        raise ProtocolError(f"acquire: {len(payload)} bytes are too few")
    lease, shard = _ACQUIRE.unpack_from(payload)
    return Acquire(split_keys(payload, _ACQUIRE.size), shard, lease, payload)


def encode_lease(lease: int) -> bytes:
    """Payload of RELEASE. Raises `ArgumentError` for a number that no lease has."""
    try:
        return _LEASE.pack(lease)
    except struct.error:
        raise ArgumentError(f"release: lease {lease} is out of range") from None


def decode_lease(payload: bytes | bytearray) -> int:
    if len(payload) != _LEASE.size:
        raise ProtocolError(f"release: expected {_LEASE.size} bytes, got {len(payload)}")
    return int(_LEASE.unpack(payload)[0])


# -- replies -----------------------------------------------------------------------------------------------------------


def encode_hello_reply(reply: HelloReply) -> bytes:
    """Payload of the OK reply to HELLO."""
    return _ENCODER.encode(reply)


def decode_hello_reply(payload: bytes | bytearray) -> HelloReply:
    return decode_value(_HELLO_REPLY, payload)


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
    return AcquireReply(lease, expires_in, Locations(bytes(memoryview(payload)[_ACQUIRED.size :])))


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


# -- verbs -------------------------------------------------------------------------------------------------------------


class Codec(NamedTuple):
    """How the verbs of one code come and are answered, at the manager."""

    decode: Callable[[bytes | bytearray], Verb[Any]]
    """Raises `ProtocolError` for what is no such verb."""
    encode_reply: Callable[[Any], bytes]
    """Of what `Directory.handle` gave."""


class _Packed(NamedTuple):
    """How a verb with bytes of its own goes, and what comes back, at a client."""

    code: int
    encode: Callable[[Any], bytes]
    decode_reply: Callable[[bytes | bytearray], Any]


VERBS: tuple[type[Verb[Any]], ...] = tuple(Verb.__subclasses__())
"""Every verb, in the order of `api.py`."""
_PACKED: dict[type[Verb[Any]], _Packed] = {
    Lookup: _Packed(LOOKUP, lambda verb: join_keys(verb.keys), decode_count),
    Acquire: _Packed(ACQUIRE, lambda verb: encode_acquire(join_keys(verb.keys), verb.shard, verb.lease), decode_acquired),
    Release: _Packed(RELEASE, lambda verb: encode_lease(verb.lease), lambda payload: None),
}
_CALL: msgspec.msgpack.Decoder[Verb[Any]] = msgspec.msgpack.Decoder(reduce(or_, set(VERBS) - set(_PACKED)))
CODECS: dict[int, Codec] = {
    LOOKUP: Codec(lambda payload: Lookup(split_keys(payload), payload), encode_count),
    ACQUIRE: Codec(decode_acquire, lambda reply: encode_acquired(*reply)),
    RELEASE: Codec(lambda payload: Release(decode_lease(payload)), lambda reply: b""),
    CALL: Codec(lambda payload: decode_value(_CALL, payload), _ENCODER.encode),
}
"""By code, at the manager."""


def _reply_decoder(verb: type[Verb[Any]]) -> Callable[[bytes | bytearray], Any]:
    if verb in _PACKED:
        return _PACKED[verb].decode_reply
    (base,) = verb.__orig_bases__  # type: ignore[attr-defined]
    return partial(decode_value, msgspec.msgpack.Decoder(get_args(base)[0]))


_REPLY_DECODERS = {verb: _reply_decoder(verb) for verb in VERBS}


def encode_verb(verb: Verb[Any]) -> tuple[int, bytes]:
    """Code and payload of a request. Raises `ArgumentError` for a packed verb whose fields do not fit."""
    packed = _PACKED.get(type(verb))
    return (packed.code, packed.encode(verb)) if packed is not None else (CALL, _ENCODER.encode(verb))


def decode_reply(verb: Verb[R], payload: bytes | bytearray) -> R:
    """The reply to a verb. Raises `ProtocolError` when the payload is none."""
    reply: R = _REPLY_DECODERS[type(verb)](payload)
    return reply


def in_frames(verb: Verb[Any], max_frame: int) -> list[Verb[Any]]:
    """What to send in one session so that each fits into a frame; the reply to the last is the reply to `verb`. Raises
    `ProtocolError` when one slab's headers alone do not fit."""
    if not isinstance(verb, Mount):
        return [verb]
    *parts, last = _inventory_parts(verb.inventory, max_frame // 2)
    return [*(InventoryPart(verb.info.uuid, part) for part in parts), msgspec.structs.replace(verb, inventory=last)]


def _inventory_parts(inventory: Sequence[SlabInventory], limit: int) -> Iterator[list[SlabInventory]]:
    """Split so that each part's headers have at most `limit` bytes. Yields at least one part."""
    part: list[SlabInventory] = []
    size = 0
    for slab in inventory:
        nbytes = len(slab.slab_header) + len(slab.slot_headers)
        if nbytes > limit:
            raise ProtocolError(f"slab {slab.slab}: {nbytes} bytes of headers do not fit a frame; raise manager.max_frame")
        if part and size + nbytes > limit:
            yield part
            part, size = [], 0
        part.append(slab)
        size += nbytes
    yield part
