"""Slabs as this process sees them: its own and those mapped from other lenders, found by `SlotLocation`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from ..errors import IntegrityError, SegmentError, SlabGoneError, VCacheError
from .backing import MappedSlab, OwnedSlab, SlabBacking
from .importer import Importer, Link
from .slots import SegmentInfo, SegmentKind, SlabGeometry, SlotLocation, slab_geometry

__all__ = ["BackingFactory", "MappedSlab", "OwnedSlab", "PinnedSlab", "PinnedSlot", "RemoteSlot", "SegmentMap", "SlabBacking"]

logger = logging.getLogger(__name__)

BackingFactory = Callable[[str], SlabBacking]
"""Makes the backing that maps slabs of one device (`SegmentInfo.device`). Raises `VCacheError` where this process cannot."""

_GEOMETRIES = 1024
_ANNOUNCED_WITHIN = 0.25


class PinnedSlot(NamedTuple):
    """A slot whose slab stays mapped until `SegmentMap.unpin`."""

    slab: MappedSlab
    header_offset: int
    payload_offset: int


class PinnedSlab(NamedTuple):
    """A slab that stays mapped until `SegmentMap.unpin_all`."""

    slab: MappedSlab
    geometry: SlabGeometry


class RemoteSlot(NamedTuple):
    """A slot in memory of another host, as its lender's transfer engine knows it."""

    segment: bytes
    """UUID: one lender's life. An endpoint may come to stand for another lender."""
    endpoint: str
    header: int
    """Addresses in the lender's memory."""
    payload: int
    slab: int


class _Local(NamedTuple):
    """A segment lent by this process."""

    find: Callable[[int], MappedSlab | None]
    backing: SlabBacking


class _Segment:
    """What a number stands for. Replaced, never changed, but for `stalled_until`."""

    __slots__ = ("addresses", "distrusted", "info", "link", "local", "problem", "slabs", "stalled_until")

    def __init__(
        self, info: SegmentInfo, local: _Local | None, link: Link | None, problem: str, elsewhere: bool, distrusted: str
    ) -> None:
        self.info = info
        self.addresses = {slab.index: slab.address for slab in info.slabs if slab.address} if elsewhere else {}
        """Of slabs on another host that a transfer engine can read; never of this host's, which are mapped."""
        self.distrusted = distrusted
        """Why nothing is read or written there any more; empty for a segment in use."""
        self.local = local
        self.link = link
        self.problem = problem
        self.slabs = {slab.index: slab.nbytes for slab in info.slabs}
        self.stalled_until = 0.0

    def find(self, index: int) -> MappedSlab | None:
        if self.distrusted:
            return None
        if self.local is not None:
            return self.local.find(index)
        return self.link.mapped.get(index) if self.link is not None else None


class SegmentMap:
    """Turns locations into memory. Thread-safe; only `pin`, `prepare`, `unreachable` and `close` may block, bounded.

    The connection to a segment's lender is made as soon as the segment is known and kept for as long as this process lives:
    by its end the lender knows that this process writes no more. Therefore a client must never ask for a ticket on a
    segment it is not connected to: it puts `unreachable()` into every `PutRequest.avoid`.
    """

    def __init__(
        self,
        client_id: bytes,
        host: str,
        backings: Mapping[SegmentKind, BackingFactory],
        *,
        timeout: float = 1.0,
        retry_after: float = 2.0,
    ) -> None:
        """`host`: `hostinfo.host_id()`. `backings`: for each kind that this process can map, called once per device.
        `timeout`: seconds that a call waits for a lender. `retry_after`: seconds for which a failure is remembered."""
        self._client_id = client_id
        self._host = host
        self._factories = dict(backings)
        self._timeout = timeout
        self._retry_after = retry_after
        self._lock = threading.Lock()
        self._segments: dict[int, _Segment] = {}
        self._announced = threading.Condition(self._lock)
        self._newest = 0
        """Highest segment number announced in this epoch, or waited for in vain."""
        self._links: dict[bytes, Link] = {}
        self._locals: dict[bytes, _Local] = {}
        self._distrusted: dict[bytes, str] = {}
        self._backing_lock = threading.Lock()
        self._backings: dict[tuple[SegmentKind, str], SlabBacking] = {}
        self._geometries: dict[tuple[int, int], SlabGeometry] = {}
        self._importer = Importer(client_id, timeout=timeout, retry_after=retry_after)

    # -- what exists -------------------------------------------------------------------------------------------------

    def add_local(self, uuid: bytes, find: Callable[[int], MappedSlab | None], backing: SlabBacking) -> None:
        """Segment `uuid` is lent by this process: its slabs come from `find` (`Lender.slab`), not from a broker. Call before
        `update`. Lender and map must have one client id: an unfinished write counts as over when its writer is neither the
        lender nor connected to it."""
        with self._lock:
            self._locals[uuid] = _Local(find, backing)

    def update(self, info: SegmentInfo) -> None:
        """A segment is new or has changed (`SegmentMounted`). Does not block."""
        with self._lock:
            old = self._segments.get(info.number)
            if old is not None and old.info.uuid != info.uuid:
                self._forget(info.number)
            for number in [n for n, other in self._segments.items() if other.info.uuid == info.uuid and n != info.number]:
                del self._segments[number]
            local = self._locals.get(info.uuid)
            link, problem = None, ""
            if local is not None and info.owner != self._client_id:
                local, problem = None, "it is lent by this process, but under another client id"
            elif local is None:
                if info.host != self._host:
                    problem = "it is on another host"
                elif info.kind not in self._factories:
                    problem = f"this process cannot map {info.kind} memory"
                else:
                    link = self._link(info)
            elsewhere = local is None and info.host != self._host and bool(info.endpoint)
            self._segments[info.number] = _Segment(info, local, link, problem, elsewhere, self._distrusted.get(info.uuid, ""))
            self._newest = max(self._newest, info.number)
            self._announced.notify_all()
            if link is not None:
                lent = {slab.index for slab in info.slabs}
                if unlent := [index for index in list(link.mapped) if index not in lent]:
                    self._importer.drop(link, unlent)

    def forget(self, number: int) -> None:
        """The segment is gone (`SegmentGone`): unmap it as soon as no pin holds it. Unknown numbers are ignored. Does not
        block."""
        with self._lock:
            self._forget(number)

    def forget_all(self) -> None:
        """A new epoch: numbers mean nothing any more. What is mapped stays for as long as its lender lives, so that segments
        that come back (`update`) need not be mapped again. Does not block."""
        with self._lock:
            segments, self._segments = self._segments, {}
            self._newest = 0
        for segment in segments.values():
            if segment.link is not None:
                self._importer.unbind(segment.link)

    def segments(self) -> list[SegmentInfo]:
        """What was last announced, by number."""
        with self._lock:
            return [segment.info for _, segment in sorted(self._segments.items())]

    # -- slots -------------------------------------------------------------------------------------------------------

    def pin(self, location: SlotLocation) -> PinnedSlot | None:
        """The slot's memory, mapped until `unpin`; maps the slab if need be, which blocks for at most `timeout`.

        None when the location lies in no known slab or not inside it, or when the slab is gone or cannot be reached."""
        found = self.pin_slab(location)
        if found is None:
            return None
        slab, geometry = found
        return PinnedSlot(slab, geometry.header_offset(location.slot), geometry.payload_offset(location.slot))

    def pin_slab(self, location: SlotLocation) -> PinnedSlab | None:
        """As `pin`, for all slots of that size in the slab of this one; undone by `unpin_all`."""
        segment = self._segments.get(location.segment) or self._await(location.segment)
        nbytes = segment.slabs.get(location.slab) if segment is not None else None
        if segment is None or nbytes is None:
            return None
        geometry = self._geometry(nbytes, location.slot_bytes)
        if geometry is None or not 0 <= location.slot < geometry.slots:
            return None
        slab = segment.find(location.slab)
        if slab is None:
            slab = self._map(segment, location.slab, nbytes)
        if slab is None or slab.nbytes != nbytes or not slab.pin():
            return None
        return PinnedSlab(slab, geometry)

    def would_wait(self, locations: Sequence[SlotLocation]) -> bool:
        """Whether to pin these may mean to wait for a lender, because a slab is not mapped yet. Does not block."""
        for number, index in {(location.segment, location.slab) for location in locations}:
            segment = self._segments.get(number)
            if segment is None or (segment.find(index) is None and segment.link is not None):
                return True
        return False

    def remote(self, location: SlotLocation) -> RemoteSlot | None:
        """Where a transfer engine finds the slot, when it is in memory of another host that exports it; None for all others,
        and for a location that lies in no known slab. Waits for moments when the segment has not been announced yet."""
        segment = self._segments.get(location.segment) or self._await(location.segment)
        address = segment.addresses.get(location.slab, 0) if segment is not None else 0
        if segment is None or not address:
            return None
        geometry = self._geometry(segment.slabs[location.slab], location.slot_bytes)
        if geometry is None or not 0 <= location.slot < geometry.slots:
            return None
        header, payload = geometry.header_offset(location.slot), geometry.payload_offset(location.slot)
        return RemoteSlot(segment.info.uuid, segment.info.endpoint, address + header, address + payload, address)

    def unpin(self, slot: PinnedSlot) -> None:
        """Undo one `pin`. Nothing computed from the slot's addresses may be used afterwards. Does not block."""
        slot.slab.unpin()

    def unpin_all(self, slabs: Iterable[MappedSlab]) -> None:
        """Undo one `pin_slab` of each, as `unpin` does for `pin`. Does not block."""
        for slab in slabs:
            slab.unpin()

    def read(self, slab: MappedSlab, offset: int, nbytes: int) -> bytes:
        """Copy bytes of a pinned slab to host memory. Blocks until they are there. Raises `SegmentError`."""
        return self._backing(slab.kind, slab.device).read(slab, offset, nbytes)

    def read_into(self, slab: MappedSlab, offset: int, out: memoryview) -> None:
        """Copy `len(out)` bytes of a pinned slab into host memory (`SlabBacking.read_into`). Blocks until they are there.
        Raises `SegmentError`."""
        self._backing(slab.kind, slab.device).read_into(slab, offset, out)

    def write(self, slab: MappedSlab, offset: int, data: bytes) -> None:
        """Write bytes, such as a header, into a pinned slab; seen by all importers when it returns. Raises `SegmentError`."""
        self._backing(slab.kind, slab.device).write(slab, offset, data)

    def prepare(self, number: int, timeout: float = 30.0, stop: Callable[[], bool] = lambda: False) -> int:
        """Map all slabs of a segment now, one after the other, so that no transfer pays for it. Blocks at most about `timeout`
        seconds, or until `stop`, which is asked before each slab; returns how many are mapped."""
        segment = self._segments.get(number)
        if segment is None or segment.link is None:
            return 0 if segment is None or segment.local is None else len(segment.slabs)
        deadline = time.monotonic() + timeout
        mapped = 0
        for index, nbytes in list(segment.slabs.items()):
            if stop():
                break
            # Never two at a time: a transfer that needs a slab now must not wait for all that are mapped ahead.
            future = self._importer.map(segment.link, index, nbytes)
            mapped += self._result(segment, future, deadline - time.monotonic()) is not None
            if segment.stalled_until:
                break
        return mapped

    # -- what cannot be reached ----------------------------------------------------------------------------------------

    def unreachable(self) -> list[int]:
        """Numbers of segments that this process cannot use now: on another host, without a connection to their lender, or
        whose mapping failed lately. Tries failed ones again after `retry_after`. Waits at most `timeout` for lenders that
        have just been announced."""
        return sorted(self.problems())

    def distrust(self, number: int, problem: str) -> None:
        """Use this segment no more, for as long as this process lives, under whatever number it comes back. Slots that are
        pinned stay so. Unknown numbers are ignored. Does not block."""
        with self._lock:
            segment = self._segments.get(number)
            if segment is None or segment.distrusted:
                return
            segment.distrusted = self._distrusted[segment.info.uuid] = problem
        logger.error(
            "segment %d on %s is used no more by this process: %s; restart its lender, and look at that memory",
            number,
            segment.info.device,
            problem,
        )

    def problems(self) -> dict[int, str]:
        """`unreachable`, with the reasons."""
        found = {}
        deadline = time.monotonic() + self._timeout
        for number, segment in list(self._segments.items()):
            problem = self._problem(segment, deadline)
            if problem:
                found[number] = problem
        return found

    # -- end ---------------------------------------------------------------------------------------------------------

    def close(self, timeout: float = 5.0) -> None:
        """Unmap everything and end all connections. Waits at most `timeout` seconds for pins; slabs still pinned then stay
        mapped until they are not. Idempotent."""
        with self._lock:
            self._segments = {}
        if not self._importer.close(timeout):
            logger.warning("transfers still run after %.1f s; their slabs stay mapped until they end", timeout)
            return
        with self._backing_lock:
            backings, self._backings = self._backings, {}
        for backing in backings.values():
            backing.close()

    def mapped_bytes(self) -> int:
        """Bytes mapped from other processes now."""
        with self._lock:
            return sum(slab.nbytes for link in self._links.values() for slab in list(link.mapped.values()))

    def check_integrity(self) -> None:
        """Raises `IntegrityError` when what is mapped contradicts what is known. For tests; call without traffic."""
        with self._lock:
            uuids = [segment.info.uuid for segment in self._segments.values()]
            if len(set(uuids)) != len(uuids):
                raise IntegrityError("I4: two numbers of one epoch stand for one segment")
            for number, segment in self._segments.items():
                if segment.link is not None and self._links.get(segment.info.uuid) is not segment.link:
                    raise IntegrityError(f"I3: segment {number} has two connections to its lender")
                for index, slab in segment.link.mapped.items() if segment.link is not None else ():
                    if index in segment.slabs and slab.nbytes != segment.slabs[index]:
                        raise IntegrityError(f"I1: slab {index} of segment {number} is mapped with {slab.nbytes} bytes")
                    if slab.retired or slab.pins < 0 or not slab.address:
                        raise IntegrityError(f"I1: slab {index} of segment {number} is used but not mapped: {slab}")

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _await(self, number: int) -> _Segment | None:
        """A location may overtake the announcement of its segment by moments; segments are numbered as they are mounted. A
        number that does not come is waited for once."""
        with self._announced:
            if number <= self._newest:
                return None
            self._announced.wait_for(lambda: number <= self._newest, min(self._timeout, _ANNOUNCED_WITHIN))
            self._newest = max(self._newest, number)
            return self._segments.get(number)

    def _link(self, info: SegmentInfo) -> Link:
        link = self._links.get(info.uuid)
        if link is None:
            link = self._importer.open(info.uuid, info.broker, lambda: self._backing(info.kind, info.device))
            self._links[info.uuid] = link
        link.bound = True
        return link

    def _forget(self, number: int) -> None:
        segment = self._segments.pop(number, None)
        if segment is not None and segment.link is not None:
            self._importer.drop(segment.link)
            self._importer.unbind(segment.link)

    def _backing(self, kind: SegmentKind, device: str) -> SlabBacking:
        for local in list(self._locals.values()):
            if (local.backing.kind, local.backing.device) == (kind, device):
                return local.backing
        with self._backing_lock:
            backing = self._backings.get((kind, device))
            if backing is None:
                backing = self._backings[kind, device] = self._factories[kind](device)
            return backing

    def _geometry(self, nbytes: int, slot_bytes: int) -> SlabGeometry | None:
        geometry = self._geometries.get((nbytes, slot_bytes))
        if geometry is None:
            try:
                geometry = slab_geometry(nbytes, slot_bytes)
            except SegmentError:
                return None
            if len(self._geometries) >= _GEOMETRIES:
                self._geometries.clear()
            self._geometries[nbytes, slot_bytes] = geometry
        return geometry

    def _map(self, segment: _Segment, index: int, nbytes: int) -> MappedSlab | None:
        link = segment.link
        if link is None or index in link.gone or self._problem(segment, time.monotonic() + self._timeout):
            return None
        return self._result(segment, self._importer.map(link, index, nbytes), self._timeout)

    def _result(self, segment: _Segment, future: Future[MappedSlab], timeout: float) -> MappedSlab | None:
        try:
            return future.result(max(0.0, timeout))
        except SlabGoneError:
            return None
        except TimeoutError:
            problem = f"its lender does not answer (no slab within {timeout:.1f} s)"
        except VCacheError as error:
            problem = str(error)
        logger.warning("segment %d: %s", segment.info.number, problem)
        segment.problem = problem
        segment.stalled_until = time.monotonic() + self._retry_after
        return None

    def _problem(self, segment: _Segment, deadline: float) -> str:
        link = segment.link
        if link is None or segment.distrusted:
            return segment.distrusted or segment.problem
        now = time.monotonic()
        if link.state == "idle" and link.problem and now >= link.retry_at:
            link.settled.clear()
            self._importer.reconnect(link)
        if not link.settled.wait(max(0.0, deadline - now)):
            return link.problem or "its lender has not answered yet"
        if link.problem:
            return link.problem
        if segment.stalled_until > now:
            return segment.problem
        segment.problem, segment.stalled_until = "", 0.0
        return ""
