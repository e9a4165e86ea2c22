"""VRAM made of host memory: slabs of kind `cuda` that CPU movers reach, so that both tiers of the pool work without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vcache.segment.backing import MappedSlab
from vcache.segment.host import HostBacking
from vcache.segment.slots import SegmentKind

GPU = "GPU-00000000-0000-0000-0000-emulated0000"


class EmulatedVram(HostBacking):
    """`amid` is called in the middle of every copy of a payload to host memory, with the slab and the payload's offset."""

    kind: SegmentKind = "cuda"
    device = GPU
    frees_under_importers = False

    def __init__(self, amid: Callable[[MappedSlab, int], None] | None = None) -> None:
        super().__init__()
        self.amid = amid

    def read_into(self, slab: MappedSlab, offset: int, out: memoryview) -> None:
        half = out.nbytes // 2
        super().read_into(slab, offset, out[:half])
        if self.amid is not None:
            self.amid(slab, offset)
        super().read_into(slab, offset + half, out[half:])


def emulate_vram(replace: Callable[[Any, str, Any], None], amid: Callable[[MappedSlab, int], None] | None = None) -> None:
    """Engines opened from now on find a GPU whose memory is emulated. `replace(object, name, value)`: `setattr`, or a test's
    `monkeypatch.setattr`."""
    from vcache.cache import opening

    factories = {"host": lambda device: HostBacking(), "cuda": lambda device: EmulatedVram(amid)}
    replace(opening, "find_gpu", lambda device, kind: GPU)
    replace(opening, "open_page_lock", lambda gpu, stack: None)
    replace(opening, "backing_factories", lambda gpu, page_lock: factories)
