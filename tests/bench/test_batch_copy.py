"""Copy plans of `bench.batch_copy`, carried out on the CPU; pairings of `bench.interference` with made-up work."""

from __future__ import annotations

import ctypes
import threading

import pytest

from vcache.errors import ArgumentError

torch = pytest.importorskip("torch", reason="needs torch")

from vcache.bench import batch_copy, interference, moves, paged_data, transfer  # noqa: E402
from vcache.bench.mover_runs import finish  # noqa: E402
from vcache.bench.remote_slab import RemoteSlabs  # noqa: E402
from vcache.config import TransferConfig  # noqa: E402
from vcache.paged.select import mover_for  # noqa: E402

SPEC = transfer._SMALL_SPEC
CPU = torch.device("cpu")
TOKENS = 512


def carry_out(entries: batch_copy.BatchPlan) -> None:
    """Slots to cache."""
    for target, source, size in zip(entries.cache, entries.slots, entries.sizes, strict=True):
        ctypes.memmove(int(target), int(source), int(size))


@pytest.mark.parametrize("block", [16, 64])
def test_a_plan_reads_what_the_mover_wrote(block: int) -> None:
    arena = paged_data.CacheArena(SPEC, 2 * TOKENS, CPU)
    cache = arena.cache(block)
    source = paged_data.block_mapping(TOKENS, block, arena.tokens, CPU, seed=1)
    free = torch.tensor(sorted(set(range(arena.tokens)) - set(source.tolist())))
    with RemoteSlabs("host", paged_data.slab_size(SPEC, 4), 1) as lent:
        transfers = paged_data.Slots(SPEC, lent.slabs).transfers(TOKENS, 2)
        finish(mover_for(cache, TransferConfig()).store(cache, source, transfers, paged_data.WRITER))
        expected = [arena.rows(source, layer).clone() for layer in range(SPEC.num_layers)]
        carry_out(batch_copy.plan(cache, free, transfers))
    for layer, rows in enumerate(expected):
        assert torch.equal(arena.rows(free, layer), rows)
        assert torch.equal(arena.rows(source, layer), rows), "rows of others were touched"


def test_a_plan_refuses_what_is_not_whole_blocks() -> None:
    arena = paged_data.CacheArena(SPEC, TOKENS, CPU)
    with RemoteSlabs("host", paged_data.slab_size(SPEC, 4), 1) as lent:
        transfers = paged_data.Slots(SPEC, lent.slabs).transfers(300, 2)
        with pytest.raises(ArgumentError, match="44 tokens from 256 on is not whole blocks"):
            batch_copy.plan(arena.cache(16), torch.arange(300), transfers)


class Slowed:
    """Work that runs at 100, and at 60 while somebody moves bytes."""

    name, unit, where = "work", "TFLOP/s", "reading GPU"

    def __init__(self, moving: threading.Event) -> None:
        self.moving = moving

    def rate(self, seconds: float) -> float:
        self.moving.clear()
        return 60.0 if self.moving.wait(0.05) else 100.0


def test_interference_compares_with_the_work_alone() -> None:
    moving = threading.Event()
    found = list(interference.measure([moves.Move("vram", 8, moving.set, 1000)], [Slowed(moving)], seconds=0.02))
    assert [pair.path for pair in found] == ["vram", "nothing"]
    assert [(pair.alone, pair.beside) for pair in found] == [(100.0, 60.0), (100.0, 100.0)]
    assert found[0].loss == pytest.approx(0.4)
    assert found[0].gbps > 0
    row = found[0].row()
    assert row["path"] == "work on the reading GPU beside vram"
    assert (row["tflops"], row["where"], row["moves"], row["grid"]) == (60.0, "reading GPU", "vram", 8)
    assert "60 of" in found[0].line()


def test_interference_passes_on_what_a_move_raises() -> None:
    def broken() -> None:
        raise ArgumentError("no such place")

    with pytest.raises(ArgumentError, match="no such place"):
        list(interference.measure([moves.Move("x", 0, broken, 1)], [Slowed(threading.Event())], seconds=0.01))
