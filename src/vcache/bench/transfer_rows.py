"""Rows of `vcache bench transfer`: how they are made, compared with plain copies, judged and drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .mover_runs import MoverResult
from .moves import RawCopy
from .plot import Curve, size_text
from .report import Column

_MIB = 2**20
_FLAT = 0.9
COLUMNS = (
    Column("path", "path"),
    Column("operation", "operation"),
    Column("mapping", "mapping"),
    Column("size", "size"),
    Column("page", "page"),
    Column("gbps", "GB/s", ",.1f"),
    Column("gbps_low", "slowest", ",.1f"),
    Column("gbps_high", "fastest", ",.1f"),
    Column("ratio", "of plain copy", ".2f"),
    Column("device_ms", "device ms", ",.3f"),
    Column("call_ms", "call ms", ",.3f"),
    Column("runs", "runs", "d"),
)
USUAL_PAGE = 32 * 1024
"""Bytes of a block per region in the usual case: 16 tokens of 2 KiB."""
_REFERENCE = {
    ("vram", "store"): "d2d",
    ("vram", "retrieve"): "d2d",
    ("peer", "store"): "peer copy",
    ("peer", "retrieve"): "peer copy",
    ("dram", "store"): "d2h",
    ("dram", "retrieve"): "h2d",
}
"""The plain copy of the same bytes that a path is compared with."""


def mover_row(path: str, page: int, found: MoverResult) -> dict[str, Any]:
    """`gbps` and its spread are of the device's time; `call_ms` is what a caller waits."""
    rates = [found.nbytes / seconds / 1e9 for seconds in found.device[:3]]
    return {
        "path": path,
        "operation": found.operation,
        "mapping": found.mapping,
        "size": size_text(found.nbytes),
        "nbytes": found.nbytes,
        "page": size_text(page),
        "page_bytes": page,
        "gbps": rates[0],
        "gbps_low": rates[2],
        "gbps_high": rates[1],
        "device_ms": found.device.median * 1e3,
        "call_ms": found.call.median * 1e3,
        "runs": found.device.runs,
    }


def raw_row(found: RawCopy) -> dict[str, Any]:
    """A plain copy, bytes counted once."""
    rates = [found.nbytes / seconds / 1e9 for seconds in found.seconds[:3]]
    row = {"path": found.path, "operation": "copy", "size": size_text(found.nbytes), "nbytes": found.nbytes}
    row |= {"gbps": rates[0], "gbps_low": rates[2], "gbps_high": rates[1]}
    return row | {"device_ms": found.seconds.median * 1e3, "runs": found.seconds.runs}


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Set `ratio` of the pool's paths: their GB/s over those of the plain copy of the same bytes in the same run."""
    plain = {(row["path"], row["nbytes"]): row["gbps"] for row in rows if row["operation"] == "copy"}
    for row in rows:
        reference = _REFERENCE.get((row["path"].split()[0], row["operation"]))
        if reference and (reference, row["nbytes"]) in plain:
            row["ratio"] = row["gbps"] / plain[reference, row["nbytes"]]


def judge(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The project's own targets against these rows: one line each, `met` or `MISSED`. Pure."""

    def check(what: str, path: str, operation: str, goal: float, low: int, high: int, mapping: str = "") -> Iterator[str]:
        found = [
            row
            for row in rows
            if (row["path"], row["operation"]) == (path, operation)
            and low <= row["nbytes"] <= high
            and (row["page_bytes"] == USUAL_PAGE or "rows" in path)
            and (not mapping or row["mapping"] == mapping)
            and row.get("ratio") is not None
        ]
        if found:
            worst = min(found, key=lambda row: row["ratio"])
            verdict = "met" if worst["ratio"] >= goal else "MISSED"
            sizes = ", ".join(dict.fromkeys(row["size"] for row in found))
            where = f"worst at {worst['size']} of {sizes}"
            yield f"{verdict}: {what}: {worst['ratio']:.2f} of the plain copy (goal {goal}), {where}"

    big = 8192 * _MIB
    yield from check("retrieve from VRAM, large, whole blocks", "vram", "retrieve", 0.85, 1024 * _MIB, big, "blocks")
    yield from check("retrieve from VRAM, large, random mapping", "vram", "retrieve", 0.85, 1024 * _MIB, big, "random")
    yield from check("retrieve from VRAM, 256 MiB", "vram", "retrieve", 0.75, 256 * _MIB, 256 * _MIB)
    large = [
        row
        for row in rows
        if (row["path"], row["operation"], row.get("mapping")) == ("vram", "retrieve", "blocks")
        and row["nbytes"] >= 1024 * _MIB
        and row["page_bytes"] == USUAL_PAGE
    ]
    if len(large) > 1:
        lowest, highest = min(row["gbps"] for row in large), max(row["gbps"] for row in large)
        verdict = "met" if lowest >= _FLAT * highest else "MISSED"
        sizes = ", ".join(row["size"] for row in large)
        yield f"{verdict}: flat from 1 GiB on ({sizes}): {lowest:,.0f} to {highest:,.0f} GB/s (goal: within {1 - _FLAT:.0%})"
    yield from check("retrieve, rows of 256 bytes", "vram 256 B rows", "retrieve", 0.5, 1024 * _MIB, big)
    yield from check("retrieve from pinned host memory", "dram", "retrieve", 0.9, 64 * _MIB, big)
    yield from check("store to pinned host memory", "dram", "store", 0.9, 64 * _MIB, big)
    yield from check("retrieve from a peer, whole blocks", "peer", "retrieve", 0.95, 64 * _MIB, big, "blocks")
    yield from check("store to a peer, whole blocks", "peer", "store", 0.95, 64 * _MIB, big, "blocks")


def curves(rows: Sequence[dict[str, Any]]) -> list[Curve]:
    """The figure: direct VRAM against the ways through DRAM, over size. Pure."""
    wanted = [
        ("peer", "retrieve", "VCache, from a peer's VRAM", "direct"),
        ("vram", "retrieve", "VCache, from VRAM of the same GPU", "direct"),
        ("vram", "store", "VCache, to VRAM of the same GPU", "direct"),
        ("peer copy", "copy", "plain peer copy", "reference"),
        ("d2d", "copy", "plain copy on one GPU", "reference"),
        ("dram", "retrieve", "VCache, from pinned DRAM (one way)", "dram"),
        ("bounce pipelined", "copy", "GPU-DRAM-GPU, pinned, pipelined", "dram"),
        ("bounce serial", "copy", "GPU-DRAM-GPU, pinned, serial", "dram"),
        ("bounce pageable", "copy", "GPU-DRAM-GPU, pageable", "dram"),
        ("host", "retrieve", "VCache on CPU, from host memory", "direct"),
    ]
    found = []
    for path, operation, label, group in wanted:
        of_path = [row for row in rows if (row["path"], row["operation"]) == (path, operation)]
        pages = {row.get("page_bytes", 0) for row in of_path}
        page = USUAL_PAGE if USUAL_PAGE in pages else max(pages, default=0)
        points = sorted(
            (row["nbytes"], row["gbps"], row["gbps_low"], row["gbps_high"])
            for row in of_path
            if row.get("page_bytes", 0) == page and row.get("mapping", "blocks") == "blocks"
        )
        if points:
            found.append(Curve(label, points, group))
    return found
