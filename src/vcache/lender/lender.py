"""Lends a segment of memory: allocates it, announces it to the manager, grows it, and gives it back to its owner."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from ..config import SegmentConfig
from ..errors import ManagerError, ManagerRefusedError, SegmentError
from ..manager.api import (
    GateReport,
    GateWriter,
    Push,
    ResizeRequested,
    SessionInfo,
    UndoneSlots,
    WipeSlots,
    WriterLost,
)
from ..manager.client import Manager
from ..segment.backing import OwnedSlab, SlabBacking
from ..segment.gate import Gate
from ..segment.handover import prepare_broker_dir
from ..segment.hostinfo import host_id, raise_file_limit
from ..segment.slots import SegmentInfo
from .broker import Broker
from .export import RemoteExport
from .orphans import Orphans
from .slabs import LentSlab, LentSlabs, unfinished_writers

logger = logging.getLogger(__name__)

_RETRY = 1.0
_POLL = 0.05
"""Seconds between looks at writers that the manager waits for."""


class ShrinkReport(NamedTuple):
    """What a shrink gave back to the owner."""

    slabs: int
    """Slabs taken out of the pool."""
    freed_bytes: int
    """Physical bytes given back to the system when the call returned."""
    seconds: float
    late: tuple[bytes, ...]
    """Client ids of processes (possibly this one) that did not unmap in time. VRAM that they map, and host memory that they may
    have pinned for a GPU, is free when they do."""


class Lender:
    """Lends one segment, from construction to `close`. A `Listener` of the manager. Thread-safe.

    What the manager must be told is worked off by a thread of its own, again and again until it has succeeded; resizing has
    another, because it waits for importers.
    """

    def __init__(
        self,
        manager: Manager,
        backing: SlabBacking,
        config: SegmentConfig,
        *,
        host: str = "",
        export: RemoteExport | None = None,
        on_resize: Callable[[int], None] | None = None,
    ) -> None:
        """Allocates `config.size` payload bytes and subscribes to `manager`; neither manager, backing nor `export` is closed
        by the lender. `host`: default `host_id()`. `export`: by which other hosts read what is lent. `on_resize(payload
        bytes)`: called after each change of size.

        Raises `SegmentError` when the memory or the socket cannot be had; nothing is left behind then."""
        self.uuid = os.urandom(16)
        self.backing = backing
        self._manager = manager
        self._config = config
        self._host = host or host_id()
        self._export = export
        self._on_resize = on_resize
        self._changed = threading.Condition()
        """Guards what follows, never held while something blocks."""
        self._session: SessionInfo | None = None
        self._mounted = False
        self._announced: set[int] = set()
        self._gone: set[bytes] = set()
        self._wipes: list[WipeSlots] = []
        self._target: int | None = None
        self._closed = False
        self._manager_lock = threading.Lock()
        """Serialises what the manager learns about slabs with what is done to them: mount, add, drop."""
        self._resize_lock = threading.Lock()
        self._work: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._resizes: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._awaited: set[tuple[bytes, int]] = set()
        """Writers that the manager was told of at the last mount, (client id, slab), and waits for."""
        self._undone: list[UndoneSlots] = []
        """What they left, and the manager was not told of."""
        self._floor = 0
        """Highest epoch heard of."""
        raise_file_limit()
        self._gate = Gate(manager.client_id)
        try:
            self._broker = Broker(prepare_broker_dir(config.broker_dir), self.uuid, self._gate, self._importer_gone)
        except BaseException:
            self._gate.close()
            raise
        self._lent = LentSlabs(backing, self._broker, int(config.slab_size), manager.client_id, self._gate.own, export)
        try:
            self._lent.create(int(config.size))
        except BaseException:
            self._broker.close()
            self._gate.close()
            raise
        self._orphans = Orphans(self._lent)
        self._threads = [
            threading.Thread(target=self._run_work, name="vcache-lender", daemon=True),
            threading.Thread(target=self._run_resizes, name="vcache-resize", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        manager.subscribe(self)

    # -- what is lent --------------------------------------------------------------------------------------------------

    @property
    def info(self) -> SegmentInfo:
        """The segment as it is now; `number` is 0."""
        return SegmentInfo(
            uuid=self.uuid,
            kind=self.backing.kind,
            host=self._host,
            device=self.backing.device,
            broker=self._broker.path,
            owner=self._manager.client_id,
            slabs=tuple(self._lent.infos()),
            endpoint=self._export.endpoint if self._export is not None else "",
        )

    @property
    def payload_bytes(self) -> int:
        """Payload bytes lent now."""
        return self._lent.payload_bytes

    @property
    def mounted(self) -> bool:
        """Whether the manager of the current session knows the segment with all its slabs."""
        return self._mounted and self._announced.issuperset(slab.index for slab in self._lent.infos())

    def wait_mounted(self, timeout: float) -> bool:
        """Block until `mounted`; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.mounted, timeout)

    def slab(self, index: int) -> OwnedSlab | None:
        """This process's own mapping of a slab, for `SegmentMap.add_local`; None when it is not lent (any more)."""
        return self._lent.find(index)

    def importers(self) -> set[bytes]:
        """Client ids of the processes that are connected to the broker now."""
        return self._broker.importers()

    # -- size ----------------------------------------------------------------------------------------------------------

    def grow(self, nbytes: int) -> int:
        """Lend `nbytes` more payload bytes, in slabs of `slab_size` (the last may be smaller). Returns the payload bytes lent
        now. Raises `SegmentError`, and lends nothing more, when they cannot be had. Blocks for the allocation; the manager is
        told in the background (`wait_mounted`)."""
        with self._resize_lock:
            return self._grow(_positive(nbytes))

    def shrink(self, nbytes: int) -> ShrinkReport:
        """Take at least `nbytes` payload bytes (or all there is) back, in whole slabs. Their chunks become misses.

        Blocks for one call to the manager, then at most `unmap_timeout` seconds for importers, however many are dead or
        stopped. Without a manager the lender chooses the slabs itself."""
        with self._resize_lock:
            return self._shrink(_positive(nbytes))

    def resize(self, nbytes: int) -> int:
        """Grow or shrink to `nbytes` payload bytes, as far as whole slabs allow (after a shrink not more than that). Returns
        the payload bytes lent now. Blocks and raises like `grow` and `shrink`."""
        with self._resize_lock:
            now = self.payload_bytes
            if nbytes > now:
                return self._grow(nbytes - now)
            if nbytes < now:
                self._shrink(now - max(0, nbytes))
            return self.payload_bytes

    def close(self) -> None:
        """Stop lending and give the memory back: tell the manager, ask importers to unmap, free. Blocks at most about
        `unmap_timeout` and one call to the manager (twice that when a resize is under way). Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
        self._work.put(False)
        self._resizes.put(False)
        for thread in self._threads:
            thread.join()
        with self._resize_lock, self._manager_lock:
            slabs = self._lent.remove()
            try:
                self._manager.unmount(self.uuid)
            except ManagerError as error:
                logger.info("segment %s: the manager could not be told of its end: %s", self._name, error)
        self._lent.take_back(slabs, self._config.unmap_timeout)
        self._broker.close()
        self._gate.close()

    # -- Listener ------------------------------------------------------------------------------------------------------

    def on_session(self, session: SessionInfo) -> None:
        with self._changed:
            self._session = session
            self._floor = max(self._floor, session.epoch)
            self._mounted = False
            self._wipes.clear()
        self._work.put(True)

    def on_disconnect(self) -> None:
        with self._changed:
            self._session = None
            self._mounted = False

    def on_push(self, push: Push) -> None:
        if isinstance(push, WipeSlots) and push.segment == self.uuid:
            with self._changed:
                self._wipes.append(push)
            self._work.put(True)
        elif isinstance(push, ResizeRequested) and push.segment == self.uuid:
            with self._changed:
                self._target = push.nbytes
            self._resizes.put(True)
        elif isinstance(push, WriterLost) and push.segment == self.uuid and self._ended(push.client):
            self._importer_gone(push.client)

    def _ended(self, writer: bytes) -> bool:
        """Tell whether that client's writes are over, for good: nobody maps a slab without a connection to the broker."""
        return writer != self._manager.client_id and self._broker.bar(writer)

    def _importer_gone(self, client: bytes) -> None:
        with self._changed:
            self._gone.add(client)
        self._work.put(True)

    # -- telling the manager -------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return self.uuid.hex()[:8]

    def _run_work(self) -> None:
        pause: float | None = None
        problem = ""
        while True:
            try:
                if not self._work.get(timeout=pause):
                    return
            except queue.Empty:
                logger.debug("segment %s: looking again", self._name)
            try:
                self._tell_manager()
                problem, pause = "", _POLL if self._awaited else None
            except Exception as error:
                # Of any kind: without this thread the segment would never be mounted again.
                if str(error) != problem:
                    expected = isinstance(error, ManagerError | SegmentError)
                    text = "segment %s: the manager could not be told, trying again: %s"
                    logger.warning(text, self._name, error, exc_info=not expected)
                problem, pause = str(error), _RETRY

    def _tell_manager(self) -> None:
        """Tell whatever the manager does not know yet. Idempotent; stops at the first call that fails."""
        if self._session is None:
            return
        with self._manager_lock:
            try:
                if not self._mounted:
                    self._mount()
                else:
                    self._announce()
            except ManagerRefusedError:
                self._mounted = False  # It believes something else than we do: start over.
                raise
        with self._changed:
            wipes, gone = list(self._wipes), sorted(self._gone)
        for wipe in wipes:
            for index, offset in wipe.slots:
                self._lent.wipe(index, offset)
            self._manager.wiped(wipe.token)
            with self._changed:
                # Only now: one that could not be reported is reported again. Another session's list is not ours to change.
                self._wipes = [other for other in self._wipes if other is not wipe]
        self._tell_of_writers()
        for client in gone:
            try:
                self._manager.importer_gone(self.uuid, client)
            except ManagerRefusedError as error:
                logger.warning("segment %s: the end of importer %s was refused: %s", self._name, client.hex(), error)
            with self._changed:
                self._gone.discard(client)

    def _tell_of_writers(self) -> None:
        """Tell who has left the gate, of those that the manager waits for, once the last one of a slab has, and undo what they
        left behind. In this order: when the manager has heard of it, others write there."""
        if not self._awaited:
            return
        busy = {slab for _, slab in self._gate.writers({slab for _, slab in self._awaited})}
        left = sorted(writer for writer in self._awaited if writer[1] not in busy)
        if left:
            for slab in sorted({slab for _, slab in left}):
                self._undone += self._orphans.undo(slab)
            self._manager.writers_left(self.uuid, [GateWriter(*writer) for writer in left], self._undone)
            self._awaited.difference_update(left)
            self._undone = []

    def _mount(self) -> None:
        session = self._session
        info = self.info
        indices = [slab.index for slab in info.slabs]
        # In this order: from the new fence word on no earlier ticket passes the gate; then who has; then what they wrote.
        # What they write from now on, no manager shall ever see.
        fence = self._gate.renew()
        writers = self._gate.writers(indices)
        inventory = self._orphans.inventory(indices, {slab for _, slab in writers})
        ended = {writer for writer in unfinished_writers(inventory) if self._ended(writer)}
        report = GateReport(fence=fence, writers=tuple(GateWriter(*writer) for writer in sorted(writers)), floor=self._floor)
        self._manager.mount(info, inventory, report)
        with self._changed:
            if session is None or self._session is not session:
                return
            self._awaited, self._undone = writers, []
            self._mounted = True
            self._announced = {slab.index for slab in info.slabs}
            self._gone |= ended
            self._changed.notify_all()
        logger.info("segment %s: mounted, %d slabs, %d bytes", self._name, len(info.slabs), info.nbytes)

    def _announce(self) -> None:
        new = [slab for slab in self._lent.infos() if slab.index not in self._announced]
        if new:
            self._manager.add_slabs(self.uuid, new)
            with self._changed:
                self._announced.update(slab.index for slab in new)
                self._changed.notify_all()

    # -- growing and shrinking -----------------------------------------------------------------------------------------

    def _run_resizes(self) -> None:
        while self._resizes.get():
            with self._changed:
                target, self._target = self._target, None
            if target is None:
                continue
            try:
                self.resize(target)
            except SegmentError as error:
                logger.error("segment %s: cannot resize to %d bytes: %s", self._name, target, error)
            except Exception:
                logger.exception("segment %s: resizing to %d bytes failed", self._name, target)

    def _grow(self, nbytes: int) -> int:
        if self._closed:
            raise SegmentError("segment: it is closed")
        self._lent.create(nbytes)
        self._work.put(True)
        return self._resized()

    def _shrink(self, nbytes: int) -> ShrinkReport:
        started = time.monotonic()
        # A mount between choosing and removing would announce the slabs again.
        with self._manager_lock:
            slabs = self._choose(nbytes)
        freed, late = self._lent.take_back(slabs, self._config.unmap_timeout)
        self._work.put(True)
        self._resized()
        return ShrinkReport(len(slabs), freed, time.monotonic() - started, tuple(sorted(late)))

    def _choose(self, nbytes: int) -> dict[int, LentSlab]:
        if self._mounted:
            try:
                self._announce()
                return self._lent.remove(self._manager.drop_slabs(self.uuid, self._lent.physical_bytes(nbytes)))
            except ManagerError as error:
                logger.warning("segment %s: shrinking without the manager: %s", self._name, error)
        with self._changed:
            self._mounted = False  # The next mount replaces what the manager believes now.
        return self._lent.remove(self._lent.newest(nbytes))

    def _resized(self) -> int:
        payload = self.payload_bytes
        if self._on_resize is not None:
            self._on_resize(payload)
        return payload


def _positive(nbytes: int) -> int:
    if nbytes < 1:
        raise SegmentError(f"segment size: a change must be at least 1 byte, got {nbytes}")
    return nbytes
