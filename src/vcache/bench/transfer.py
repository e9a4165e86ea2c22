"""`vcache bench transfer`: the pool's ways to move KV beside every other way, by size and page size, in one run.

Below the manager: the mover reads and writes slabs of another process. The end-to-end numbers are `end_to_end.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ..config import TransferConfig
from ..errors import DeviceUnavailableError, IntegrityError, VCacheError
from ..paged.select import mover_for
from ..spec import KVCacheSpec
from .mover_runs import Mapping, MoverResult, MoverRuns
from .moves import RawCopies
from .paged_data import CHUNK, LLAMA_8B, CacheArena, Slots, block_mapping, slab_size
from .plot import size_text
from .remote_slab import RemoteSlabs
from .report import Report
from .timing import event_seconds, wall_seconds
from .transfer_rows import COLUMNS, USUAL_PAGE, add_ratios, curves, judge, mover_row, raw_row

if TYPE_CHECKING:
    import torch

    from .batch_copy import BatchCopier, BatchPlan
    from .moves import Move

__all__ = ["PAGE_SIZES", "SIZES", "TransferOptions", "curves", "run"]

MIB = 2**20
SIZES = tuple(n * MIB for n in (1, 4, 16, 64, 256, 1024, 2048))
PAGE_SIZES = tuple(n * 1024 for n in (4, 8, 16, 32, 64, 128, 256))
COPY_ENGINE_PAGES = tuple(n * 1024 for n in (16, 32, 256))
COPY_ENGINE_SIZES = tuple(n * MIB for n in (64, 1024))
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
    paths: Sequence[str] = ("vram", "peer", "dram")
    """Which of the pool's paths."""
    seconds: float = 0.5
    """About how long each row of a path is measured, twice: on the device's clock and on the host's."""
    copy_engines: bool = False
    """Also copy engines over the pages of each path."""
    interference: bool = False
    """Also what a matrix product and decoding lose."""
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
    sources = [device] if "vram" in options.paths or not others else []
    for source in (*sources, *others[:1]):
        progress(f"plain copies, {source} to {device}")
        _attempt(report, f"plain copies from {source}", partial(_raw, report, sizes, source, device, bool(sources)))
    arena = CacheArena(LLAMA_8B, max(sizes) // LLAMA_8B.token_bytes, device)
    places = [("vram", "cuda", device), *(("peer", "cuda", other) for other in others[:1]), ("dram", "host", device)]
    for path, kind, place in [each for each in places if each[0] in options.paths]:
        _attempt(report, f"path {path}", partial(_pool_path, options, report, arena, path, kind, place, sizes, progress))
    del arena
    torch.cuda.empty_cache()
    if "vram" in options.paths:
        _attempt(report, "rows of 256 bytes", partial(_small_rows, options, report, device, sizes, progress))


def _attempt(report: Report, what: str, action: Callable[[], None]) -> None:
    """A path that cannot be measured is a note; the others go on."""
    try:
        action()
    except (VCacheError, RuntimeError, OSError) as error:
        report.notes.append(f"NOT MEASURED: {what}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")


def _raw(report: Report, sizes: Sequence[int], source: torch.device, target: torch.device, both: bool) -> None:
    """`both`: copies on the target alone are measured too, and those that begin at a peer are named so."""
    copies = RawCopies(max(sizes), source, target)
    for size in sizes:
        for found in copies.measure(size):
            row = raw_row(found)
            if both and source != target and found.path != "peer copy":
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
            if options.copy_engines and page in COPY_ENGINE_PAGES:
                what = f"copy engines, {path}, pages of {size_text(page)}"
                few = [size for size in sizes if size in COPY_ENGINE_SIZES]
                _attempt(report, what, partial(_copy_engines, report, arena, path, lent_slots, page, few))


def _copy_engines(report: Report, arena: CacheArena, path: str, slots: Slots, page: int, sizes: Sequence[int]) -> None:
    """The same bytes between the same places, a copy for each page. Only the payloads: no headers, no checks."""
    import torch

    from .batch_copy import BatchCopier, plan

    block = page // arena.spec.row_bytes
    cache, copier = arena.cache(block), BatchCopier(arena.device)
    for size in sizes:
        tokens = size // arena.spec.token_bytes
        mapping = block_mapping(tokens, block, arena.tokens, arena.device)
        entries = plan(cache, mapping, slots.transfers(tokens, 2))
        for operation in ("store", "retrieve"):
            start = partial(_start, copier, entries, operation == "store")
            with torch.cuda.stream(copier.stream):
                device = event_seconds(start, arena.device, 7)
            call = wall_seconds(lambda run, start=start: (start(run), copier.stream.synchronize()), 5)  # type: ignore[misc]
            found = MoverResult("store" if operation == "store" else "retrieve", "blocks", size, device, call)
            report.rows.append(mover_row(f"{path} copy engines", page, found))
        _check_copies(copier, arena, entries, mapping)


def _start(copier: BatchCopier, entries: BatchPlan, store: bool, run: int) -> None:
    copier.start(entries, store=store)


def _check_copies(copier: BatchCopier, arena: CacheArena, entries: BatchPlan, mapping: torch.Tensor) -> None:
    """There and back again. Raises `IntegrityError` when the last layer's bytes differ."""
    import torch

    last = arena.spec.num_layers - 1
    expected = arena.rows(mapping, last).clone()
    torch.cuda.current_stream(arena.device).synchronize()
    copier.copy(entries, store=True)
    arena.clear([last])
    torch.cuda.current_stream(arena.device).synchronize()
    copier.copy(entries, store=False)
    if not torch.equal(arena.rows(mapping, last), expected):
        raise IntegrityError(f"I1: {len(mapping)} tokens came back from the copy engines with other bytes")


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
    """One GPU: VRAM of another process, pinned host memory, and plain copies."""
    from .interference import Decoding, Products, measure
    from .moves import mover_moves, plain_moves

    nbytes = 1024 * MIB
    arena = CacheArena(LLAMA_8B, nbytes // LLAMA_8B.token_bytes, device)
    slots = nbytes // LLAMA_8B.payload_bytes(CHUNK)
    with _lent(LLAMA_8B, "cuda", device, device, slots) as vram, _lent(LLAMA_8B, "host", device, device, slots) as dram:
        moves: list[Move] = []
        for name, lent in (("vram", vram), ("dram", dram)):
            own = Slots(LLAMA_8B, lent.slabs)
            moves += mover_moves(arena, name, own, nbytes, 2)
            _attempt(report, f"copy engines, {name}", partial(_engine_moves, moves, arena, name, own, nbytes))
        moves += plain_moves(RawCopies(nbytes, device, device), nbytes)
        for found in measure(moves, [Products(device), Decoding(device)]):
            report.rows.append(found.row() | {"size": size_text(nbytes), "nbytes": nbytes})
            report.notes.append(found.line())


def _engine_moves(moves: list[Move], arena: CacheArena, name: str, slots: Slots, nbytes: int) -> None:
    from .moves import copy_engine_moves

    moves += copy_engine_moves(arena, name, slots, nbytes)


def _lent(spec: KVCacheSpec, kind: str, place: torch.device, through: torch.device, slots: int) -> RemoteSlabs:
    from ..paged.layout import device_name

    nbytes = slab_size(spec, min(slots, _SLAB_SLOTS))
    count = -(-slots // min(slots, _SLAB_SLOTS))
    return RemoteSlabs(kind, nbytes, count, device=device_name(place), through=device_name(through))


def _runs(options: TransferOptions, arena: CacheArena, slots: Slots, block_size: int, generation: int) -> MoverRuns:
    cache = arena.cache(block_size)
    return MoverRuns(arena, slots, cache, mover_for(cache, TransferConfig(grid=options.grid)), generation, options.seconds)


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
