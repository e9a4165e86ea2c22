"""The write gate of a worker's process undone, to show that the soak would see it missing."""

from __future__ import annotations

from typing import Literal

from vcache.segment.gate import WriteGate

Part = Literal["", "gate", "fence", "count"]
"""All of it; or only that a ticket's fence word is compared; or only that the process is counted in."""


def undo(part: Part) -> None:
    """Change this process's gates, before there are any."""
    enter, leave = WriteGate.enter, WriteGate.leave

    def admit(self: WriteGate, slab: int, fence: int) -> bool:
        return True

    def admit_counted(self: WriteGate, slab: int, fence: int) -> bool:
        return enter(self, slab, self._words[0])

    def compare(self: WriteGate, slab: int, fence: int) -> bool:
        admitted = enter(self, slab, fence)
        if admitted:
            leave(self, slab)
        return admitted

    def nothing(self: WriteGate, slab: int) -> None:
        """Nobody was counted in."""

    if part == "fence":
        WriteGate.enter = admit_counted  # type: ignore[method-assign]
    elif part:
        WriteGate.enter = admit if part == "gate" else compare  # type: ignore[method-assign]
        WriteGate.leave = nothing  # type: ignore[method-assign]
