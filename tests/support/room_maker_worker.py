"""An engine process whose VRAM is emulated, and whose copies to host memory can be held up in the middle of a payload."""

from __future__ import annotations

import threading
from typing import Any

from support.emulated_vram import emulate_vram
from support.engine_worker import EngineWorker

from vcache.keys import CacheKey


class RoomMakerWorker(EngineWorker):
    def __init__(self, config: dict[str, Any], spec: dict[str, Any]) -> None:
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self._amid = threading.Event()
        emulate_vram(setattr, self._copying)
        super().__init__(config, spec)

    def _copying(self, *arguments: Any) -> None:
        self._amid.set()
        self._may_go_on.wait()

    def hold_copies(self) -> None:
        """The next copy stops in the middle, until `go_on`."""
        self._amid.clear()
        self._may_go_on.clear()

    def is_held(self) -> bool:
        return self._amid.is_set() and not self._may_go_on.is_set()

    def go_on(self) -> None:
        self._may_go_on.set()

    def no_writes(self) -> bool:
        return self.engine.pool.no_writes()

    def counters(self) -> dict[str, int]:
        counters: dict[str, int] = self.engine.get_stats()["counters"]
        return counters

    def vram_slots(self) -> int:
        """Slots of VRAM that are not free."""
        segments = [s for s in self.engine.manager.stats().segments if s.info.kind == "cuda"]
        return sum(s.slots_used + s.slots_processing + s.slots_quarantined for s in segments)

    def in_storage(self, keys: list[str]) -> list[bool]:
        """Which printed keys, of any namespace, the storage tier of this engine holds."""
        storage = self.engine.cache.storage
        assert storage is not None
        return [bool(storage._storage.prefix([CacheKey.parse(key)], 0)) for key in keys]
