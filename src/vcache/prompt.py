"""A prompt in one call: checked arguments, and its chunks, named only as far as they are needed."""

from __future__ import annotations

from array import array

from .keys import ChunkSpan, TokenDatabase
from .pool import Chunk


class Prompt:
    """Token ids with what a mask and an offset say of them. Not thread-safe."""

    def __init__(self, database: TokenDatabase, ids: array[int], skipped: int = 0, offset: int = 0) -> None:
        """`skipped`: leading tokens that are left alone. `offset`: index of the first token that the slot mapping covers."""
        self._database = database
        self._ids = ids
        self._offset = offset
        self._spans: list[ChunkSpan] = []
        count = database.count(len(ids))
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
