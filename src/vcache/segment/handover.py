"""Defines what a lender's broker and an importer say to each other, and where the broker's socket lies.

Unix `SOCK_SEQPACKET`: the kernel keeps message boundaries, so one message is one frame and a file descriptor belongs to exactly
one. Frames are msgpack arrays that start with a one-letter tag. An importer connects **once** per segment and keeps the
connection for as long as it may touch the segment's memory: its end is the sign that the process is dead or has unmapped.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated

import msgspec

from ..errors import ProtocolError, SegmentError
from ..sockets import socket_folder

BROKER_VERSION = 2
MAX_FRAME = 32 * 1024
"""Bytes. A longer message is malformed."""
MAX_INDICES = 4096
"""Slab indices in one message; more are split."""
MAX_SOCKET_PATH = 107
"""Bytes that fit in `sockaddr_un`, without the final zero."""

SlabIndex = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
SlabIndices = Annotated[list[SlabIndex], msgspec.Meta(max_length=MAX_INDICES)]
Identity = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class _Message(msgspec.Struct, frozen=True, array_like=True):
    pass


class Hello(_Message, frozen=True, array_like=True, tag="H"):
    """First message of an importer. The version comes first so that every later version can read it."""

    version: int
    client: Identity
    segment: Identity


class Get(_Message, frozen=True, array_like=True, tag="G"):
    """Importer asks for one slab. Answer: `Granted` or `Gone`."""

    slab: SlabIndex


class Unmapped(_Message, frozen=True, array_like=True, tag="A"):
    """Importer no longer maps these slabs, asked or not."""

    slabs: SlabIndices


class Welcome(_Message, frozen=True, array_like=True, tag="W"):
    """Carries the file descriptor of the segment's write gate as `SCM_RIGHTS`."""

    version: int
    row: Annotated[int, msgspec.Meta(ge=0, lt=2**16)] = 0
    """Of this importer, in the gate."""


class Refused(_Message, frozen=True, array_like=True, tag="R"):
    """Last message before the broker hangs up."""

    reason: Annotated[str, msgspec.Meta(max_length=1000)]


class Granted(_Message, frozen=True, array_like=True, tag="F"):
    """Carries the slab's file descriptor as `SCM_RIGHTS`."""

    slab: SlabIndex
    nbytes: Annotated[int, msgspec.Meta(gt=0, le=2**62)]


class Gone(_Message, frozen=True, array_like=True, tag="N"):
    """The lender no longer lends this slab, and never will again."""

    slab: SlabIndex


class Unmap(_Message, frozen=True, array_like=True, tag="U"):
    """Lender wants memory back. Answer: `Unmapped`, once transfers that run have ended."""

    slabs: SlabIndices


FromImporter = Hello | Get | Unmapped
FromLender = Welcome | Refused | Granted | Gone | Unmap

_NOT_DECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_from_importer: msgspec.msgpack.Decoder[FromImporter] = msgspec.msgpack.Decoder(FromImporter)
_from_lender: msgspec.msgpack.Decoder[FromLender] = msgspec.msgpack.Decoder(FromLender)


def encode(message: FromImporter | FromLender) -> bytes:
    return msgspec.msgpack.encode(message)


def decode_from_importer(frame: bytes) -> FromImporter:
    """Decode one message to a lender. Raises `ProtocolError` for anything that no importer sends."""
    try:
        return _from_importer.decode(frame)
    except _NOT_DECODABLE as error:
        raise ProtocolError(f"malformed message from an importer: {error}") from None


def decode_from_lender(frame: bytes) -> FromLender:
    """Decode one message to an importer. Raises `ProtocolError` for anything that no lender sends."""
    try:
        return _from_lender.decode(frame)
    except _NOT_DECODABLE as error:
        raise ProtocolError(f"malformed message from a lender: {error}") from None


def batches(indices: list[int]) -> list[list[int]]:
    """Split slab indices into lists that fit one message each."""
    return [indices[start : start + MAX_INDICES] for start in range(0, len(indices), MAX_INDICES)]


def prepare_broker_dir(path: str) -> Path:
    """Create the folder for sockets (mode 0700) or check the one that is there. Empty `path`: the default.

    Raises `SegmentError` when it belongs to somebody else or others may enter it."""
    folder = socket_folder(path)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise SegmentError(f"segment.broker_dir: cannot create {folder}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise SegmentError(f"segment.broker_dir: {folder} is not a folder (links are not followed)")
    if status.st_uid != os.geteuid():
        raise SegmentError(f"segment.broker_dir: {folder} belongs to user {status.st_uid}; choose a folder of your own")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise SegmentError(f"segment.broker_dir: {folder} is open to other users; run chmod 700 {folder}")
    return folder


def socket_path(folder: Path, segment: bytes) -> Path:
    """Name the socket of `segment`. Raises `SegmentError` when it is too long for the system."""
    path = folder / f"{segment[:8].hex()}.sock"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise SegmentError(
            f"segment.broker_dir: {folder} is too long: socket paths have at most {MAX_SOCKET_PATH} bytes, "
            f"this one {len(os.fsencode(path))}; choose a shorter folder"
        )
    return path
