"""Leases: which records readers hold, and until when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .records import Record


class Lease:
    """Pins `records` (one pin per mention) for `client` until `expires`."""

    __slots__ = ("client", "expires", "number", "records")

    def __init__(self, number: int, client: bytes, expires: float, records: list[Record]) -> None:
        self.number = number
        self.client = client
        self.expires = expires
        self.records = records

    def cover(self) -> set[bytes]:
        """Keys that it holds."""
        return {record.key for record in self.records}


class LeaseTable:
    """All leases of the manager. Numbers start at 1 and are never used twice within an epoch."""

    def __init__(self, ttl: float) -> None:
        self.ttl = ttl
        self.leases: dict[int, Lease] = {}
        """In order of expiry, because all live equally long."""
        self._last = 0

    def grant(self, client: bytes, records: list[Record], now: float) -> Lease:
        """Pins the records."""
        self._last = number = self._last + 1
        lease = self.leases[number] = Lease(number, client, now + self.ttl, records)
        for record in records:
            record.pins += 1
        return lease

    def get(self, number: int, client: bytes, now: float) -> Lease | None:
        """The lease if it is this client's and has not expired."""
        lease = self.leases.get(number)
        return lease if lease is not None and lease.client == client and lease.expires > now else None

    def drop(self, number: int, client: bytes) -> Sequence[Record]:
        """End a lease and unpin; its records, or nothing if it is unknown or somebody else's."""
        lease = self.leases.get(number)
        if lease is None or lease.client != client:
            return ()
        del self.leases[number]
        for record in lease.records:
            record.pins -= 1
        return lease.records

    def drop_client(self, client: bytes) -> list[Record]:
        """End all leases of a client. O(leases)."""
        numbers = [lease.number for lease in self.leases.values() if lease.client == client]
        return [record for number in numbers for record in self.drop(number, client)]

    def expired(self, now: float) -> Iterator[Lease]:
        """Leases that are over, oldest first; each must be dropped before the next is taken."""
        while (lease := next(iter(self.leases.values()), None)) is not None and lease.expires <= now:
            yield lease

    def next_expiry(self) -> float | None:
        lease = next(iter(self.leases.values()), None)
        return lease.expires if lease is not None else None

    def count(self, client: bytes) -> int:
        return sum(1 for lease in self.leases.values() if lease.client == client)

    def pins(self) -> dict[int, int]:
        """Pins per record, by `id(record)`: what the records' own counts must equal."""
        found: dict[int, int] = {}
        for lease in self.leases.values():
            for record in lease.records:
                found[id(record)] = found.get(id(record), 0) + 1
        return found
