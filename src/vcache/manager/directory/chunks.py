"""The directory's dictionaries (visible chunks, chunks being written, ghosts) and the links from a chunk to the one before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from weakref import WeakValueDictionary

from ...errors import IntegrityError
from ...segment.slots import LOCATION_BYTES
from .eviction import EvictionPolicy
from .records import Namespace, Record
from .slabs import USED, Write

_COMMON_INDICES = 4096


class Pending:
    """A chunk whose shards are not all complete."""

    __slots__ = ("num_shards", "parts", "record")

    def __init__(self, record: Record, num_shards: int) -> None:
        self.record = record
        self.num_shards = num_shards
        self.parts: dict[int, Write] = {}
        """By shard: processing or used, never quarantined."""

    def is_found(self) -> bool:
        """Whether all that there is comes from inventories. A damaged header may be among it: it gives way to a writer."""
        return not any(part.writer for part in self.parts.values())

    def complete(self) -> bool:
        """Whether the last shard is there, so that it may be published."""
        return len(self.parts) == self.num_shards and all(part.state == USED for part in self.parts.values())


class ChunkTable:
    """One key is in exactly one of `visible`, `pending` and `ghosts`, or in none."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.visible: dict[bytes, Record] = {}
        """Complete chunks only (rule I2)."""
        self.pending: dict[bytes, Pending] = {}
        self.ghosts: dict[bytes, Record] = {}
        """Absent chunks that a present or pending child, or a lease, still refers to."""
        self.policy = policy
        self.orphans = 0
        """Visible records whose parent is not known although they are not the first of a prompt."""
        self._namespaces: WeakValueDictionary[bytes, Namespace] = WeakValueDictionary()
        self._indices = list(range(_COMMON_INDICES))  # shared int objects: 32 bytes less for most records

    def namespace(self, name: bytes) -> Namespace:
        namespace = self._namespaces.get(name)
        if namespace is None:
            namespace = self._namespaces[name] = Namespace(name)
        return namespace

    def any(self, key: bytes) -> Record | None:
        """Return the key's record, whichever state it is in."""
        record = self.visible.get(key)
        if record is None:
            pending = self.pending.get(key)
            record = pending.record if pending is not None else self.ghosts.get(key)
        return record

    # Life of a record

    def ghost(self, key: bytes, index: int, namespace: Namespace) -> Record:
        """Return the key's record, a new ghost if there is none. The caller gives it a child, a lease or bytes, or calls
        `settle`."""
        record = self.any(key)
        if record is None:
            record = Record(key, namespace, self._indices[index] if index < _COMMON_INDICES else index)
            self.ghosts[key] = record
        return record

    def settle(self, record: Record) -> None:
        """Forget a ghost that nothing refers to any more."""
        if not record.children and not record.leased and self.ghosts.get(record.key) is record:
            del self.ghosts[record.key]

    def begin(self, key: bytes, index: int, namespace: Namespace, num_shards: int) -> Pending:
        """Expect the shards of a chunk that is neither visible nor pending."""
        record = self.ghost(key, index, namespace)
        record.namespace = namespace
        del self.ghosts[key]
        pending = self.pending[key] = Pending(record, num_shards)
        return pending

    def abandon(self, pending: Pending) -> None:
        """Forget a pending chunk. The caller frees its slots."""
        record = pending.record
        del self.pending[record.key]
        self._retire(record)

    def publish(self, pending: Pending) -> Record:
        """Make a chunk visible all of whose shards are complete. The caller adds it to the eviction policy."""
        record = pending.record
        del self.pending[record.key]
        record.packed = b"".join([pending.parts[shard].packed for shard in range(pending.num_shards)])
        self.visible[record.key] = record
        if record.parent is None and record.index:
            self.orphans += 1
        return record

    def recover(self, key: bytes, index: int, namespace: Namespace, packed: bytes) -> Record:
        """Make a chunk visible that was found whole in an inventory; the key is neither visible nor pending. The caller adds it
        to the eviction policy."""
        record = self.ghosts.pop(key, None)
        if record is None:
            record = Record(key, namespace, self._indices[index] if index < _COMMON_INDICES else index)
        record.namespace = namespace
        record.packed = packed
        self.visible[key] = record
        if record.index:
            self.orphans += 1
        return record

    def hide(self, record: Record) -> None:
        """Make a visible chunk absent. The caller frees its slots."""
        del self.visible[record.key]
        self.policy.discard(record)
        if record.parent is None and record.index:
            self.orphans -= 1
        record.packed = b""
        record.used = 0
        self._retire(record)

    def _retire(self, record: Record) -> None:
        self.unlink(record)
        if record.children or record.leased:
            self.ghosts[record.key] = record

    # Links

    def link(self, child: Record, parent: Record) -> None:
        """Remember that `child` follows `parent`; ignored when it has a parent or the two cannot be neighbours."""
        if child.parent is not None or parent.index + 1 != child.index or parent.namespace is not child.namespace:
            return
        child.parent = parent
        parent.child = child
        parent.children += 1
        if child.packed:
            self.orphans -= 1

    def unlink(self, child: Record) -> None:
        """Forget the parent of a record that is not visible."""
        parent = child.parent
        if parent is None:
            return
        child.parent = None
        parent.children -= 1
        if parent.child is child:
            parent.child = None
        self.settle(parent)

    def relink(self, records: Sequence[Record]) -> None:
        """Learn from a look-up which recovered chunk follows which."""
        for parent, child in pairwise(records):
            if child.parent is None and child.index:
                self.link(child, parent)

    # Checks

    def check_integrity(self, leased: dict[int, int]) -> None:
        """`leased`: what the leases hold, by `id(record)`. Raises `IntegrityError` naming the rule. O(records)."""
        self.policy.check_integrity()
        children: dict[int, int] = {}
        records: list[Record] = [*self.visible.values(), *self.ghosts.values(), *(p.record for p in self.pending.values())]
        known = {id(record) for record in records}
        if len(known) != len(records) or len({record.key for record in records}) != len(records):
            raise IntegrityError("I2: a key is in two tables at once")
        for record in records:
            if record.parent is not None:
                children[id(record.parent)] = children.get(id(record.parent), 0) + 1
                if id(record.parent) not in known or record.parent.index + 1 != record.index:
                    raise IntegrityError(f"links: parent of {record.key.hex()} is not in the directory or not its neighbour")
        for record in records:
            name = record.key.hex()
            if record.leased != leased.pop(id(record), 0):
                raise IntegrityError(f"I3: {name} is leased {record.leased} times, not the sum over leases")
            if record.children != children.get(id(record), 0):
                raise IntegrityError(f"links: {name} counts {record.children} children, has {children.get(id(record), 0)}")
            if record.child is not None and record.child.parent is not record:
                raise IntegrityError(f"links: {name} points to a child of somebody else")
        if leased:
            raise IntegrityError("I3: leases hold records that the directory does not know")
        self._check_tables()

    def _check_tables(self) -> None:
        queued = {id(record) for queue in self.policy.queues.values() for record in queue}
        for key, record in self.visible.items():
            if record.key != key or not record.packed or len(record.packed) % LOCATION_BYTES or id(record) not in queued:
                raise IntegrityError(
                    f"I2: visible record {key.hex()} has no complete location or no place in the eviction queue"
                )
        if len(queued) != len(self.visible):
            raise IntegrityError("I2: the eviction queue holds records that are not visible")
        for key, record in self.ghosts.items():
            if record.key != key or record.packed or record.parent is not None or not (record.children or record.leased):
                raise IntegrityError(f"links: ghost {key.hex()} has bytes, a parent, or nothing that refers to it")
        for key, pending in self.pending.items():
            if pending.record.key != key or pending.record.packed or not pending.parts or pending.complete():
                raise IntegrityError(f"I2: pending chunk {key.hex()} is visible, complete or has no shard")
            for part in pending.parts.values():
                if part.slab.owners[part.slot] is not part or part.slab.segment is None:
                    raise IntegrityError(f"I3: a shard of pending chunk {key.hex()} does not hold its slot")
        hidden = [*self.ghosts.values(), *(pending.record for pending in self.pending.values())]
        if any(record.spilled for record in hidden):
            raise IntegrityError("I2: a chunk that is not visible is marked as in storage")
        orphans = sum(1 for record in self.visible.values() if record.parent is None and record.index)
        if orphans != self.orphans:
            raise IntegrityError(f"links: {orphans} orphans, recorded {self.orphans}")


def deepest_first(records: Iterable[Record]) -> list[Record]:
    """Sort records as they enter an eviction queue: a prompt's tail before its head."""
    return sorted(records, key=lambda record: record.index, reverse=True)
