"""`bench.transfer` over host memory: rows, judgement, curves, figure. What it says of GPUs only a GPU can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vcache.bench import end_to_end, give_back, interference, mover_runs, paged_data, transfer, transfer_rows
from vcache.bench.plot import Curve, draw, size_text
from vcache.bench.remote_slab import RemoteSlabs
from vcache.bench.timing import Spread, repeats_for
from vcache.errors import DeviceUnavailableError, IntegrityError, SegmentError

torch = pytest.importorskip("torch", reason="needs torch")
MIB = 2**20
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@no_gpu
def test_without_a_gpu_the_host_path_is_measured() -> None:
    lines: list[str] = []
    report = transfer.run(transfer.TransferOptions(sizes=(MIB, 2 * MIB)), lines.append)
    assert [(row["operation"], row["nbytes"]) for row in report.rows] == [
        ("store", MIB),
        ("retrieve", MIB),
        ("store", 2 * MIB),
        ("retrieve", 2 * MIB),
    ]
    assert all(row["gbps"] > 0 for row in report.rows)
    assert lines
    with pytest.raises(DeviceUnavailableError, match="no GPU 0"):
        transfer.run(transfer.TransferOptions(device=0))


@pytest.mark.processes
@pytest.mark.slow
def test_end_to_end_over_host_memory() -> None:
    found: list[dict[str, Any]] = []
    shape = end_to_end.Shape(transfer._SMALL_SPEC, long=1024, kind="host", device="cpu")
    lines = list(end_to_end.measure(found, lambda line: None, shape))
    assert [(row["operation"], row["nbytes"]) for row in found] == [
        ("store", 2 * MIB // 2),
        ("retrieve", 2 * MIB // 2),
        ("store", 2 * MIB),
        ("retrieve, kernels alone", 2 * MIB),
        ("retrieve", 2 * MIB),
        ("retrieve, not looked up before", 2 * MIB),
        ("retrieve, objects frozen", 2 * MIB),
    ]
    assert len(lines) == 5
    assert all(line.startswith("no verdict for this shape: engine.") for line in lines), "the goals are for another one"
    for met in (True, False):
        assert end_to_end._verdict(end_to_end.Shape(), met) == ("met" if met else "MISSED")


@pytest.mark.processes
@pytest.mark.slow
def test_return_of_lent_memory_while_somebody_reads() -> None:
    spec = transfer._SMALL_SPEC
    nbytes = 4 * spec.payload_bytes(512)
    what = give_back.GiveBack(nbytes, kind="host", device="cpu", spec=spec, tokens=512, readers=2, rounds=1)
    (found,) = give_back.measure(what, lambda line: None)
    assert found["freed_bytes"] >= nbytes
    assert found["late_importers"] == 0
    assert found["free_ms"] >= found["shrink_ms"] > 0
    assert set(found["free_bytes"]) == {"before", "lent", "loaded", "after"}
    hammer, reader = found["reads"]
    assert hammer["loaded"] > 0, "the load read nothing"
    assert reader["wrong"] == 0


def test_wrong_bytes_are_noticed() -> None:
    spec, cpu = transfer._SMALL_SPEC, torch.device("cpu")
    arena = paged_data.CacheArena(spec, 1024, cpu)

    class Forgetful(mover_runs.Mover):
        def __init__(self) -> None:
            from vcache.paged.cpu_mover import CpuMover

            self.inner = CpuMover()

        def reaches(self, slab: Any) -> bool:
            return True

        def store(self, *arguments: Any) -> Any:
            return self.inner.store(*arguments)

        def load(self, cache: Any, mapping: Any, transfers: Any) -> Any:
            found = self.inner.load(cache, mapping, transfers)
            arena.rows(mapping[:1], 0)  # a view of other memory would not do
            cache.tensors[0].view(torch.uint8)[0, mapping[0] // 16, mapping[0] % 16] ^= 1
            return found

    with RemoteSlabs("host", paged_data.slab_size(spec, 4), 1) as lent:
        slots = paged_data.Slots(spec, lent.slabs)
        runs = mover_runs.MoverRuns(arena, slots, arena.cache(16), Forgetful(), 2)
        with pytest.raises(IntegrityError, match="other bytes in layer 0"):
            list(runs.measure(spec.payload_bytes(512), "random", repeats=2))


def test_remote_slabs_say_why_not() -> None:
    with pytest.raises(SegmentError, match=r"the lending process failed: .*bytes"):
        RemoteSlabs("host", 1 << 46, 1)


def row(path: str, operation: str, nbytes: int, gbps: float, **more: Any) -> dict[str, Any]:
    base = {"path": path, "operation": operation, "nbytes": nbytes, "size": size_text(nbytes)}
    return base | {"gbps": gbps, "gbps_low": gbps * 0.9, "gbps_high": gbps * 1.1} | more


def rows() -> list[dict[str, Any]]:
    found = []
    for size in (256 * MIB, 1024 * MIB, 4096 * MIB):
        found += [row("d2d", "copy", size, 2000.0), row("bounce serial", "copy", size, 27.0)]
        for mapping, rate in (("blocks", 1800.0), ("random", 1690.0 if size > 1024 * MIB else 1750.0)):
            found.append(row("vram", "retrieve", size, rate, mapping=mapping, page_bytes=32768))
        found.append(row("vram", "retrieve", size, 100.0, mapping="blocks", page_bytes=4096))
    return found


def test_judgement_takes_the_worst_row() -> None:
    found = rows()
    transfer_rows.add_ratios(found)
    lines = list(transfer_rows.judge(found))
    assert [line.split(":")[0] for line in lines] == ["met", "MISSED", "met", "met"]
    assert "0.84 of the plain copy (goal 0.85), worst at 4 GiB of 1 GiB, 4 GiB" in lines[1]


def test_curves_and_figure(tmp_path: Path) -> None:
    curves = transfer.curves(rows())
    assert [curve.label for curve in curves] == [
        "VCache, from VRAM of the same GPU",
        "plain copy on one GPU",
        "GPU-DRAM-GPU, pinned, serial",
    ]
    assert [point[1] for point in curves[0].points] == [1800.0] * 3
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    draw([*curves, Curve("x", curves[0].points, "direct")], tmp_path / "figure.png", title="title")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_small_things() -> None:
    spread = Spread.of([3.0, 1.0, 2.0])
    assert spread == Spread(2.0, 1.0, 3.0, 3)
    assert spread.gbps(4_000_000_000) == 2.0
    assert (repeats_for(1e-6), repeats_for(10.0), repeats_for(0.1)) == (20, 3, 5)
    assert [size_text(n) for n in (512, 4096, 3 * MIB, 2**31, 1536 * MIB)] == ["512 B", "4 KiB", "3 MiB", "2 GiB", "1.5 GiB"]
    assert interference.Interference("vram", 8, 800.0, 720.0, 100.0, 90.0).loss == pytest.approx(0.1)
