"""Numbers of docs/benchmarks/loaded.md from the results of gpu_serve.py: the part between its two marks is replaced.

usage: python3 scripts/loaded_page.py RESULTS.json [RESULTS.json ...] PAGE.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"
_MS = ("later_mean_ms", "later_p50_ms", "later_p90_ms", "later_p99_ms", "first_mean_ms", "itl_mean_ms")
_RATIOS = (("later_mean_ms", "later turns, mean"), ("later_p90_ms", "p90"), ("later_p99_ms", "p99"))
_BASES = ("lmcache", "none", "native")
_TIERS = ("vram", "dram", "storage", "remote")


def page(text: str, results: Sequence[Mapping[str, Any]]) -> str:
    """`text` with these numbers. Raises `ValueError` without the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} in the page")
    return before + "\n".join([BEGIN, "", *numbers(results), END]) + after


def numbers(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A section for each file."""
    lines: list[str] = []
    for report in results:
        lines += section(report)
    return lines


def section(report: Mapping[str, Any]) -> list[str]:
    """Tables of one run: times, where tokens came from, what the times are made of, and ratios."""
    name, _, load = report["title"].partition(": ")
    rows = report["rows"]
    lines = [f"### {name}", "", f"{load}.", "", *table(rows), *diagnosis(rows), *ratios(rows)]
    notes = [note for note in report["notes"] if note.startswith(("KV memory", "not a quiet machine"))]
    lines += [*(f"- {note}" for note in notes), ""]
    facts = ", ".join(f"{what} {value}" for what, value in report["machine"].items() if what in _FACTS)
    return [*lines, f"`{report['command']}`, {report['when']}; {facts}.", ""]


_FACTS = ("cpu", "python", "torch", "vllm", "vcache")


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Medians over the loads that count, with the lowest and the highest for the mean of later turns."""
    head = "| way | loads | TTFT of later turns: mean | p50 | p90 | p99 | first turns: mean | ITL | req/s | hit | GB loaded |"
    lines = [head, "|---" * 11 + "|"]
    for row in rows:
        cells = [_number(row[key], 1 if key.startswith("itl") else 0) for key in _MS]
        cells[0] += _spread(row, "later_mean_ms")
        rest = (_number(row["requests_per_second"], 2), _number(row["hit_ratio"], 3), _number(row["loaded_gb"], 1))
        lines.append(f"| {row['way']} | {row['runs_done']} | " + " | ".join([*cells, *rest]) + " |")
    return [*lines, ""]


def diagnosis(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the servers count, means."""
    tiers = [tier for tier in _TIERS if any(row.get(f"loaded_{tier}_gb") for row in rows)]
    head = "| way | queue ms | prefill ms | tokens a step | own cache | connector | computed | load ms | "
    lines = [head + " | ".join(f"{tier} GB" for tier in tiers) + (" |" if tiers else ""), "|---" * (8 + len(tiers)) + "|"]
    for row in rows:
        queried = row.get("queried_tokens")
        cells = [_number(row.get(key), 0) for key in ("queue_mean_ms", "prefill_mean_ms", "tokens_a_step")]
        for key in ("own_hit_tokens", "connector_hit_tokens", "computed_tokens"):
            cells.append(f"{row[key] / queried:.0%}" if queried and row.get(key) is not None else "-")
        cells.append(_number(row.get("load_mean_ms"), 1))
        cells += [_number(row.get(f"loaded_{tier}_gb"), 1) for tier in tiers]
        lines.append(f"| {row['way']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What VCache has of what each other way has, in the same run."""
    ours = next((row for row in rows if row["way"] == "vcache"), None)
    lines = []
    for base in (row for name in _BASES for row in rows if row["way"] == name):
        if ours is not None:
            parts = [f"{name} x {ours[key] / base[key]:.2f}" for key, name in _RATIOS if base.get(key) and ours.get(key)]
            parts.append(f"req/s x {ours['requests_per_second'] / base['requests_per_second']:.2f}")
            lines.append(f"- vcache against {base['way']}: {', '.join(parts)}")
    return lines


def _spread(row: Mapping[str, Any], key: str) -> str:
    values = [run[key] for run in row.get("runs", ()) if not run["discarded"] and run[key] is not None]
    return f" [{min(values):,.0f}-{max(values):,.0f}]" if len(values) > 1 else ""


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    *files, target = map(Path, sys.argv[1:])
    target.write_text(page(target.read_text(), [json.loads(file.read_text()) for file in files]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
