"""Traces of requests: prompts as names of their blocks. Reads what the authors of Mooncake (FAST'25) and of Bailian (ATC'25)
published, as it is or compressed by xz."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..errors import VCacheError
from ..keys import DIGEST_BYTES

MOONCAKE_TOKENS = 512
"""Tokens in a block of Mooncake's traces."""
BAILIAN_TOKENS = 16


class TraceRequest(NamedTuple):
    """One prompt."""

    time: float
    """Seconds from the beginning of the trace."""
    tokens: int
    keys: list[bytes]
    """A digest for each block and all before it; the last block may be shorter."""


class Trace(NamedTuple):
    """Requests in the order of their arrival."""

    name: str
    block_tokens: int
    requests: list[TraceRequest]

    @property
    def blocks(self) -> int:
        """Blocks of all prompts."""
        return sum(len(request.keys) for request in self.requests)

    @property
    def unique(self) -> int:
        """Different blocks: what the whole trace would fill."""
        return len({key for request in self.requests for key in request.keys})


class _Line(msgspec.Struct):
    """What both formats have in common; other fields are left out."""

    timestamp: float
    """Milliseconds (Mooncake) or seconds (Bailian)."""
    input_length: int
    hash_ids: list[int]
    chat_id: int | None = None
    """Bailian's only."""


def read_trace(path: Path, limit: int = 0) -> Trace:
    """Read a `.jsonl` or `.jsonl.xz` file, the first `limit` requests of it (0: all). Raises `VCacheError`, in one line, for
    what is no trace."""
    requests: list[TraceRequest] = []
    chat: bool | None = None
    decoder = msgspec.json.Decoder(_Line)
    for number, text in enumerate(_lines(path), 1):
        if limit and len(requests) == limit:
            break
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            line = decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise VCacheError(
                f"{where}: not a trace of Mooncake or Bailian (timestamp, input_length, hash_ids): {error}"
            ) from None
        if chat is None:
            chat = line.chat_id is not None
        time = line.timestamp if chat else line.timestamp / 1e3
        block = BAILIAN_TOKENS if chat else MOONCAKE_TOKENS
        if (line.chat_id is not None) != chat:
            raise VCacheError(f"{where}: lines of two formats in one file")
        if requests and time < requests[-1].time:
            raise VCacheError(f"{where}: earlier than the line before it")
        if len(line.hash_ids) != -(-line.input_length // block):
            raise VCacheError(
                f"{where}: {len(line.hash_ids)} hash_ids for {line.input_length} tokens in blocks of {block} tokens"
            )
        requests.append(TraceRequest(time, line.input_length, _chain(line.hash_ids)))
    if not requests:
        raise VCacheError(f"{path}: no requests in it")
    return Trace(path.name.partition(".")[0], BAILIAN_TOKENS if chat else MOONCAKE_TOKENS, requests)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise VCacheError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _chain(names: list[int]) -> list[bytes]:
    """Name each block by all blocks up to it: a name in the file may stand for the block alone."""
    keys, before = [], b""
    for name in names:
        before = blake2b(before + name.to_bytes(16, "little", signed=True), digest_size=DIGEST_BYTES).digest()
        keys.append(before)
    return keys
