"""Leases: which records readers hold, and until when."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence

from ...errors import IntegrityError
from .records import Record

MAX_LEASES = 1 << 14
"""Leases of one session at most."""
MAX_LEASED = 1 << 22
"""Chunks that the leases of one session hold together, beyond which it gets no more: 32 MiB of references."""


class Lease:
    """Keeps `records` where they are for `client` until `expires`; one that is mentioned twice is leased twice."""

    __slots__ = ("client", "expires", "number", "records")

    def __init__(self, number: int, client: bytes, expires: float, records: list[Record]) -> None:
        self.number = number
        self.client = client
        self.expires = expires
        self.records = records

    def cover(self) -> set[bytes]:
        """Return the keys that it holds."""
        return {record.key for record in self.records}


class _Held:
    """What one client holds."""

    __slots__ = ("leased", "leases")

    def __init__(self) -> None:
        self.leases: dict[int, Lease] = {}
        self.leased = 0


class LeaseTable:
    """All leases of the manager. Numbers are never used twice within an epoch."""

    def __init__(self, ttl: float, last: int) -> None:
        """`last`: numbers begin above it. From the epoch on: since epochs are nanoseconds of wall-clock time, a lease of an
        earlier manager is never mistaken for one of this manager's."""
        self.ttl = ttl
        # Ordered: the oldest of a plain dict is found by walking over all that went before it.
        self.leases: OrderedDict[int, Lease] = OrderedDict()
        """In order of expiry, because all live equally long."""
        self._of: dict[bytes, _Held] = {}
        self._last = last

    def has_room(self, client: bytes) -> bool:
        """Whether the client may have one more."""
        held = self._of.get(client)
        return held is None or (len(held.leases) < MAX_LEASES and held.leased < MAX_LEASED)

    def grant(self, client: bytes, records: list[Record], now: float) -> Lease:
        """Lease these records, a list that is the lease's from now on."""
        self._last = number = self._last + 1
        lease = self.leases[number] = Lease(number, client, now + self.ttl, records)
        held = self._of.get(client)
        if held is None:
            held = self._of[client] = _Held()
        held.leases[number] = lease
        held.leased += len(records)
        for record in records:
            record.leased += 1
        return lease

    def get(self, number: int, client: bytes, now: float) -> Lease | None:
        """Return the lease if it is this client's and has not expired."""
        lease = self.leases.get(number)
        return lease if lease is not None and lease.client == client and lease.expires > now else None

    def drop(self, number: int, client: bytes) -> Sequence[Record]:
        """End a lease; its records, or nothing if it is unknown or somebody else's."""
        lease = self.leases.get(number)
        if lease is None or lease.client != client:
            return ()
        del self.leases[number]
        held = self._of[client]
        del held.leases[number]
        held.leased -= len(lease.records)
        if not held.leases:
            del self._of[client]
        for record in lease.records:
            record.leased -= 1
        return lease.records

    def drop_client(self, client: bytes) -> list[Record]:
        """End all leases of a client."""
        held = self._of.get(client)
        numbers = list(held.leases) if held is not None else []
        return [record for number in numbers for record in self.drop(number, client)]

    def expired(self, now: float) -> Iterator[Lease]:
        """Go through the leases that are over, oldest first; each must be dropped before the next is taken."""
        while (lease := next(iter(self.leases.values()), None)) is not None and lease.expires <= now:
            yield lease

    def next_expiry(self) -> float | None:
        """Tell when the next is over, or None."""
        lease = next(iter(self.leases.values()), None)
        return lease.expires if lease is not None else None

    def count(self, client: bytes) -> int:
        """Count the leases of a client."""
        held = self._of.get(client)
        return len(held.leases) if held is not None else 0

    def check_integrity(self, sessions: Container[bytes]) -> None:
        """Raises `IntegrityError` when the leases of the clients are not those of the table, or a client has no session.
        O(leases)."""
        for client, held in self._of.items():
            ours = {number: lease for number, lease in self.leases.items() if lease.client == client}
            if not ours or held.leases != ours or held.leased != sum(len(lease.records) for lease in ours.values()):
                raise IntegrityError(f"I9: leases of client {client.hex()} are counted wrongly")
            if client not in sessions:
                raise IntegrityError(f"I9: client {client.hex()} holds leases without a session")
        if sum(len(held.leases) for held in self._of.values()) != len(self.leases):
            raise IntegrityError("I9: a lease belongs to nobody")

    def leased(self) -> dict[int, int]:
        """Count the leases of each record, by `id(record)`: what `Record.leased` must equal."""
        found: dict[int, int] = {}
        for lease in self.leases.values():
            for record in lease.records:
                found[id(record)] = found.get(id(record), 0) + 1
        return found
