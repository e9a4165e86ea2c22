"""`vcache bench transfer`: the pool's ways to move KV beside every other way, by size and page size, in one run.

Below the manager: the mover reads and writes slabs of another process. The end-to-end numbers are `end_to_end.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ..config import TransferConfig
from ..errors import DeviceUnavailableError, VCacheError
from ..paged.select import mover_for
from ..spec import KVCacheSpec
from .copies import RawCopies
from .mover_runs import Mapping, MoverRuns
from .paged_data import CHUNK, LLAMA_8B, CacheArena, Slots, slab_size
from .plot import size_text
from .remote_slab import RemoteSlabs
from .report import Report
from .transfer_rows import COLUMNS, USUAL_PAGE, add_ratios, curves, judge, mover_row, raw_row

if TYPE_CHECKING:
    import torch

__all__ = ["PAGE_SIZES", "SIZES", "TransferOptions", "curves", "run"]

MIB = 2**20
SIZES = tuple(n * MIB for n in (1, 4, 16, 64, 256, 1024, 2048))
PAGE_SIZES = tuple(n * 1024 for n in (4, 8, 16, 32, 64, 128, 256))
_SLAB_SLOTS = 8
_ONE_HEAD = msgspec.structs.replace(LLAMA_8B, model="bench/one-head", num_kv_heads=1)
"""Rows of 256 bytes."""
_SMALL_SPEC = KVCacheSpec(model="bench/cpu", dtype="float16", num_layers=4, num_kv_heads=2, head_size=64)
"""For machines without a GPU."""

Progress = Callable[[str], None]


class TransferOptions(NamedTuple):
    """What to measure. `device`: index of the GPU that holds the paged cache, -1 = the first, or the CPU without one."""

    sizes: Sequence[int] = SIZES
    """Bytes of KV in one request."""
    page_sizes: Sequence[int] = PAGE_SIZES
    """Bytes of one block in one region."""
    sweep: bool = True
    """Measure by size and page size; False where only the parts below are wanted."""
    full: bool = False
    """Also 4 GiB."""
    interference: bool = False
    """Also what a matrix product loses."""
    end_to_end: bool = False
    """Also `VCacheEngine` with a manager and a lender in processes of their own."""
    grid: int = 0
    """Programs of the mover's launch; 0 = its default for the link."""
    device: int = -1
    command: str = "vcache bench transfer"


def run(options: TransferOptions, progress: Progress = lambda line: None) -> Report:
    """Measure. Blocks for one to four minutes on a GPU; without one, only the host path is measured, in seconds.

    A path that fails becomes a note, not an error. Raises `DeviceUnavailableError` when `device` does not exist.
    """
    import torch

    report = Report(title="Transfers of KV", command=options.command, columns=COLUMNS)
    if not torch.cuda.is_available():
        if options.device >= 0:
            raise DeviceUnavailableError(f"no GPU {options.device}: torch sees none")
        report.notes.append("no GPU here: host memory and the CPU mover only")
        _on_cpu(options, report, progress)
        return report
    if options.device >= torch.cuda.device_count():
        raise DeviceUnavailableError(f"no GPU {options.device}: torch sees {torch.cuda.device_count()}")
    device = torch.device("cuda", max(options.device, 0))
    with torch.cuda.device(device):
        _on_gpu(options, report, device, progress)
    add_ratios(report.rows)
    report.notes += list(judge(report.rows))
    return report


def _on_gpu(options: TransferOptions, report: Report, device: torch.device, progress: Progress) -> None:
    report.machine |= _gpu_facts(device)
    if options.sweep:
        _sweep(options, report, device, progress)
    if options.interference:
        progress("interference with a matrix product")
        _attempt(report, "interference", partial(_interference, report, device))
    if options.end_to_end:
        from .end_to_end import measure

        _attempt(report, "end to end", lambda: report.notes.extend(measure(report.rows, progress)))


def _sweep(options: TransferOptions, report: Report, device: torch.device, progress: Progress) -> None:
    import torch

    sizes = sorted({*options.sizes, *([4096 * MIB] if options.full else [])})
    others = [torch.device("cuda", i) for i in range(torch.cuda.device_count()) if i != device.index]
    for source in (device, *others[:1]):
        progress(f"plain copies, {source} to {device}")
        _attempt(report, f"plain copies from {source}", partial(_raw, report, sizes, source, device))
    arena = CacheArena(LLAMA_8B, max(sizes) // LLAMA_8B.token_bytes, device)
    places = [("vram", "cuda", device), *(("peer", "cuda", other) for other in others[:1]), ("dram", "host", device)]
    for path, kind, place in places:
        _attempt(report, f"path {path}", partial(_pool_path, options, report, arena, path, kind, place, sizes, progress))
    del arena
    torch.cuda.empty_cache()
    _attempt(report, "rows of 256 bytes", partial(_small_rows, options, report, device, sizes, progress))


def _attempt(report: Report, what: str, action: Callable[[], None]) -> None:
    """A path that cannot be measured is a note; the others go on."""
    try:
        action()
    except (VCacheError, RuntimeError, OSError) as error:
        report.notes.append(f"NOT MEASURED: {what}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")


def _raw(report: Report, sizes: Sequence[int], source: torch.device, target: torch.device) -> None:
    copies = RawCopies(max(sizes), source, target)
    for size in sizes:
        for found in copies.measure(size):
            row = raw_row(found)
            if source != target and found.path != "peer copy":
                row["path"] += " from a peer"
            report.rows.append(row)
    if not copies.check():
        report.notes.append("FAILED: the pipelined bounce moved wrong bytes")


def _pool_path(
    options: TransferOptions,
    report: Report,
    arena: CacheArena,
    path: str,
    kind: str,
    place: torch.device,
    sizes: Sequence[int],
    progress: Progress,
) -> None:
    slots = -(-max(sizes) // arena.spec.payload_bytes(CHUNK))
    with _lent(arena.spec, kind, place, arena.device, slots) as lent:
        generation = 2
        lent_slots = Slots(arena.spec, lent.slabs)
        for page in options.page_sizes:
            progress(f"{path}: pages of {size_text(page)}")
            runs = _runs(options, arena, lent_slots, page // arena.spec.row_bytes, generation)
            for size in sizes:
                report.rows += [mover_row(path, page, found) for found in runs.measure(size, "blocks")]
            if page == USUAL_PAGE:
                for size in sizes:
                    report.rows += [mover_row(path, page, found) for found in runs.measure(size, "random")]
            generation = runs.generation + 2


def _small_rows(
    options: TransferOptions, report: Report, device: torch.device, sizes: Sequence[int], progress: Progress
) -> None:
    sizes = [size for size in sizes if 256 * MIB <= size <= 1024 * MIB]
    if not sizes:
        return
    progress("vram: rows of 256 bytes")
    arena = CacheArena(_ONE_HEAD, max(sizes) // _ONE_HEAD.token_bytes, device)
    slots = -(-max(sizes) // _ONE_HEAD.payload_bytes(CHUNK))
    with _lent(_ONE_HEAD, "cuda", device, device, slots) as lent:
        runs = _runs(options, arena, Slots(_ONE_HEAD, lent.slabs), 16, 2)
        mappings: tuple[Mapping, ...] = ("blocks", "random")
        for size in sizes:
            for mapping in mappings:
                report.rows += [mover_row("vram 256 B rows", 4096, found) for found in runs.measure(size, mapping)]


def _on_cpu(options: TransferOptions, report: Report, progress: Progress) -> None:
    import torch

    spec, cpu = _SMALL_SPEC, torch.device("cpu")
    sizes = [size for size in options.sizes if size <= 64 * MIB]
    arena = CacheArena(spec, max(sizes) // spec.token_bytes, cpu)
    with _lent(spec, "host", cpu, cpu, -(-max(sizes) // spec.payload_bytes(CHUNK))) as lent:
        progress("host memory, CPU mover")
        runs = _runs(options, arena, Slots(spec, lent.slabs), 16, 2)
        for size in sizes:
            report.rows += [mover_row("host", 16 * spec.row_bytes, found) for found in runs.measure(size, "blocks", repeats=5)]


def _interference(report: Report, device: torch.device) -> None:
    import torch

    from .interference import measure

    nbytes = 1024 * MIB
    arena = CacheArena(LLAMA_8B, nbytes // LLAMA_8B.token_bytes, device)
    slots = nbytes // LLAMA_8B.payload_bytes(CHUNK)
    copies = RawCopies(nbytes, device, device)

    def copy(target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        stream.synchronize()

    make: Any = torch.cuda.Stream
    stream = make(device)
    raw = [
        ("d2d copy", partial(copy, copies.target, copies.source, stream)),
        ("h2d copy engine", partial(copy, copies.target, copies.pinned, stream)),
        ("d2h copy engine", partial(copy, copies.pinned, copies.source, stream)),
    ]
    with _lent(LLAMA_8B, "cuda", device, device, slots) as vram, _lent(LLAMA_8B, "host", device, device, slots) as dram:
        places = [("vram", Slots(LLAMA_8B, vram.slabs)), ("dram", Slots(LLAMA_8B, dram.slabs))]
        for found in measure(arena, places, nbytes, 2, raw):
            row = {"path": f"matrix product beside {found.path}", "operation": "interference", "grid": found.grid}
            row |= {"size": size_text(nbytes), "nbytes": nbytes, "gbps": found.gbps, "gbps_alone": found.gbps_alone}
            row |= {"tflops": found.tflops, "tflops_alone": found.tflops_alone, "loss": found.loss}
            report.rows.append(row)
            report.notes.append(
                f"matrix product beside {found.path} (grid {found.grid or '-'}): {found.tflops:.0f} of "
                f"{found.tflops_alone:.0f} TFLOP/s ({found.loss:.1%} lost), moving {found.gbps:.0f} GB/s "
                f"({found.gbps_alone:.0f} alone)"
            )


def _lent(spec: KVCacheSpec, kind: str, place: torch.device, through: torch.device, slots: int) -> RemoteSlabs:
    from ..devices import device_name

    nbytes = slab_size(spec, min(slots, _SLAB_SLOTS))
    count = -(-slots // min(slots, _SLAB_SLOTS))
    return RemoteSlabs(kind, nbytes, count, device=device_name(place), through=device_name(through))


def _runs(options: TransferOptions, arena: CacheArena, slots: Slots, block_size: int, generation: int) -> MoverRuns:
    cache = arena.cache(block_size)
    return MoverRuns(arena, slots, cache, mover_for(cache, TransferConfig(grid=options.grid)), generation)


def _gpu_facts(device: torch.device) -> dict[str, str]:
    import torch

    from ..segment.cuda_driver import CudaDriver

    properties = torch.cuda.get_device_properties(device)
    major, minor = CudaDriver().version()
    return {
        "gpu": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs",
        "gpus": str(torch.cuda.device_count()),
        "driver": f"CUDA {major}.{minor}",
        "torch cuda": str(torch.version.cuda),
    }
