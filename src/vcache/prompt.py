"""A prompt in one call: checked arguments, and its chunks, named only as far as they are needed."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator

from .keys import Chunk, ChunkSpan, TokenDatabase

RECENT_PROMPTS = 4
"""Prompts whose chunks' names are remembered: 16 bytes for each chunk, and the token ids."""


class Prompt:
    """Token ids with what a mask and an offset say of them. Not thread-safe."""

    def __init__(
        self,
        database: TokenDatabase,
        ids: array[int],
        skipped: int = 0,
        offset: int = 0,
        *,
        recent: RecentPrompts | None = None,
    ) -> None:
        """`ids`: nobody else's (`keys.token_array`), for chunks are named later. `skipped`: leading tokens that are left alone.
        `offset`: index of the first token that the slot mapping covers.
        `recent`: prompts of earlier calls, from which names are taken and which this one joins once it is named whole."""
        self._database = database
        self._ids = ids
        self._offset = offset
        self._recent = recent
        self._raw = ids.tobytes() if recent is not None else b""
        self._spans = recent.spans(self._raw) if recent is not None else []
        self._count = count = database.count(len(ids))
        self._first = min(-(-skipped // database.chunk_size), count)
        self.length = count - self._first
        """Chunks to move. Index 0 below is the first of them."""

    def chunks(self, begin: int, end: int) -> list[Chunk]:
        """Chunks `[begin, end)`, at most `length`. Names those before them too."""
        self._name(end)
        first, offset = self._first, self._offset
        return [
            Chunk(span.digest, index, span.end - span.start, span.start - offset)
            for index, span in enumerate(self._spans[first + begin : first + end], start=first + begin)
        ]

    def runs(self, begin: int, head: int) -> Iterator[list[Chunk]]:
        """Chunks from `begin` on. Of many that have no names yet, the first `head` come first, before the rest is named."""
        if self.unnamed(begin) >= 2 * head:
            yield self.chunks(begin, begin + head)
            begin += head
        yield self.chunks(begin, self.length)

    def digests(self) -> list[bytes]:
        """Names of all chunks to move, in order."""
        self._name(self.length)
        return [span.digest for span in self._spans[self._first :]]

    def unnamed(self, begin: int) -> int:
        """How many of the chunks from `begin` on have no name yet."""
        return self.length - max(begin, min(len(self._spans) - self._first, self.length))

    def parent(self, index: int) -> bytes:
        """Digest of the chunk before chunk `index`; empty for the prompt's first."""
        self._name(index)
        before = self._first + index - 1
        return self._spans[before].digest if before >= 0 else b""

    def tokens(self, begin: int, end: int) -> slice:
        """Positions in the prompt of the tokens of chunks `[begin, end)`. Pure."""
        size = self._database.chunk_size
        return slice((self._first + begin) * size, min((self._first + end) * size, len(self._ids)))

    def _name(self, end: int) -> None:
        missing = self._first + end - len(self._spans)
        if missing > 0:
            self._spans += self._database.spans(self._ids, after=self._spans[-1] if self._spans else None, limit=missing)
            if self._recent is not None and len(self._spans) == self._count:
                self._recent.keep(self._raw, self._spans)


class RecentPrompts:
    """The last prompts and what their chunks are called: a look-up and the store or retrieve that follows it, and prompts that
    begin alike, name their common chunks once. Comparing bytes takes a tenth of the time of naming. Thread-safe."""

    def __init__(self, chunk_size: int, limit: int = RECENT_PROMPTS) -> None:
        self._chunk_bytes = chunk_size * array("I").itemsize
        self._limit = limit
        self._lock = threading.Lock()
        self._prompts: tuple[tuple[bytes, list[ChunkSpan]], ...] = ()
        """Token ids and all chunks, the latest first. Replaced, never changed."""

    def spans(self, raw: bytes) -> list[ChunkSpan]:
        """Leading chunks of the prompt with the token ids `raw` that are known. A new list."""
        best: list[ChunkSpan] = []
        for other, spans in self._prompts:
            if raw == other:
                return list(spans)
            common = self._common(raw, other)
            if common > len(best):
                best = spans[:common]
        return best

    def keep(self, raw: bytes, spans: list[ChunkSpan]) -> None:
        """Remember a prompt and all its chunks, in place of one that it continues."""
        with self._lock:
            others = [each for each in self._prompts if not raw.startswith(each[0])]
            self._prompts = ((raw, list(spans)), *others[: self._limit - 1])

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._prompts = ()

    def _common(self, one: bytes, other: bytes) -> int:
        """Whole chunks in which both begin alike."""
        size = self._chunk_bytes
        low, high = 0, min(len(one), len(other)) // size
        if not high or one[:size] != other[:size]:
            return 0
        if one[: high * size] == other[: high * size]:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            if one[low * size : middle * size] == other[low * size : middle * size]:
                low = middle
            else:
                high = middle
        return low
