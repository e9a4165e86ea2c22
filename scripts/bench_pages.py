"""Pages for `docs/benchmarks/` from the results of the GPU scripts: one command, tables with medians and spread, figures.

usage: python3 scripts/bench_pages.py one-gpu|two-gpus|vllm RESULTS.json PAGE.md

one-gpu: gpu_suite.json of gpu_suite.py. two-gpus: two_gpus.json of two_gpus.py. vllm: gpu_vllm.json of gpu_vllm.py.
Figures and the CSV of all rows go to the folder PAGE beside PAGE.md. What was not measured is left out; what failed is listed
with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_page_parts import (
    at_size,
    give_back_table,
    header,
    interference_tables,
    median,
    parts_table,
    spread_text,
    table,
    transfer_tables,
    verdict,
    write_csv,
)
from gpu_parts import SOURCE

sys.path.insert(0, str(SOURCE))

Lines = list[str]
_GROUPS = (("VCache", "direct"), ("own", "reference"), ("recompute", "dram"), ("native", "dram"), ("LMCache", "dram"))


def vllm_page(results: dict[str, Any], folder: Path) -> Lines:
    """Time to first token on one GPU, overhead, equality."""
    modes, lengths = results["ttft_ms"], [str(length) for length in results["lengths"]]
    lines = header("vLLM on one GPU", results)
    lines += [
        "Two instances of vLLM share one GPU and a pool of VRAM that a third process lends. Llama-3.1-8B shape, random weights",
        "in bf16, eager, one request at a time, `LLM.generate(max_tokens=1)`. Every mode has prompts of its own.",
        "",
    ]
    lines += ttft_table(modes, lengths)
    lines += ttft_figure(modes, lengths, folder, "Time to first token, one GPU")
    lines += ["## Ratios", "", *ratio_lines(modes, lengths, "B, through VCache", "B, own prefix hit")]
    lines += overhead_lines(results["parts"])
    lines += equality_lines(results)
    return lines + parts_table(results["parts"])


def two_gpus_page(results: dict[str, Any], folder: Path) -> Lines:
    """Everything of `two_gpus.py`."""
    parts = results["parts"]
    found = {name: part.get("found", {}) for name, part in parts.items()}
    lines = header("Two GPUs", results)
    rows = found.get("sweep", {}).get("rows", [])
    bounced = found.get("mooncake", {}).get("rows", [])
    if rows:
        lines += ["## Transfers from GPU 1 to GPU 0 and back", ""]
        lines += transfer_tables(rows, bounced, "peer", "peer copy")
        lines += curves_figure(rows, bounced, folder, "Moving KV between two GPUs, and through DRAM")
        write_csv(rows, folder / "transfer.csv")
        lines += [f"All rows: [transfer.csv]({folder.name}/transfer.csv).", ""]
        lines += [f"- {note}" for note in found["sweep"].get("notes", [])] + [""]
    lines += grid_lines(found.get("grids", {}))
    lines += engine_lines(found.get("engines", {}))
    lines += interference_tables(found.get("interference", {}).get("rows", []))
    lines += give_back_table(found.get("return", {}))
    lines += fault_lines(found.get("faults", {}))
    lines += two_gpus_vllm(found.get("vllm", {}), folder)
    return lines + parts_table(parts)


def one_gpu_page(results: dict[str, Any], folder: Path) -> Lines:
    """Everything of `gpu_suite.py`."""
    parts = results["parts"]
    found = {name: part.get("found", {}) for name, part in parts.items()}
    lines = header("One GPU", results)
    measured = [each for each in found.values() if "notes" in each]
    rows = [row for each in measured for row in each["rows"]]
    if rows:
        write_csv(rows, folder / "transfer.csv")
    if any(row["path"] == "vram" for row in rows):
        lines += ["## Transfers between processes on one GPU", "", *transfer_tables(rows, [], "vram", "d2d")]
        lines += curves_figure(rows, [], folder, "Moving KV: directly in VRAM, and through DRAM")
        lines += [f"All rows: [transfer.csv]({folder.name}/transfer.csv).", ""]
    ends = [row for row in rows if row["path"].startswith("engine")]
    if ends:
        head = ["operation", "size", "ms, median [least, most]", "p99", "runs"]
        body = []
        for row in ends:
            spread = [row["call_ms"], row["nbytes"] / row["gbps_high"] / 1e6, row["nbytes"] / row["gbps_low"] / 1e6]
            p99 = row.get("call_p99_ms")
            body.append(
                [row["operation"], row["size"], spread_text(spread, 2), "" if p99 is None else f"{p99:.2f}", row["runs"]]
            )
        lines += ["## Engines end to end", "", *table(head, body), ""]
    lines += interference_tables([row for row in rows if row["operation"] == "interference"])
    lines += give_back_table(found.get("return", {}))
    for name in ("demo", "tests", "smoke"):
        if last := found.get(name, {}).get("last"):
            lines += [f"## {name.capitalize()}", "", "```", *last, "```", ""]
    notes = [note for each in measured for note in each["notes"] if note.startswith(("met", "MISSED"))]
    lines += [*(f"- {note}" for note in notes), ""] if notes else []
    return lines + parts_table(parts)


# Pieces of the pages ---------------------------------------------------------------------------------------------------------


def ttft_table(modes: dict[str, Any], lengths: list[str]) -> Lines:
    """Median [least-most] (runs), ms."""
    head = ["ms, median [least-most]", *(f"{int(length):,} tokens" for length in lengths)]
    body = [
        [mode, *(spread_text(some) if (some := by.get(length)) else "" for length in lengths)] for mode, by in modes.items()
    ]
    return ["## Time to first token", "", *table(head, body), ""]


def ttft_figure(modes: dict[str, Any], lengths: list[str], folder: Path, title: str) -> Lines:
    """A figure; a line that says why not when it cannot be drawn."""
    from vcache.bench.plot import Bar, draw_bars

    bars = []
    for mode, by in modes.items():
        values = [(median(by[at]), min(by[at]), max(by[at])) if by.get(at) else None for at in lengths]
        bars.append(Bar(mode, values, next((group for word, group in _GROUPS if word in mode), "reference")))
    cases = [f"{int(length):,} tokens" for length in lengths]
    return drawn(folder / "ttft.png", title, lambda path: draw_bars(cases, bars, path, title=title, unit="ms (log)"))


def curves_figure(rows: list[dict[str, Any]], bounced: list[dict[str, Any]], folder: Path, title: str) -> Lines:
    from vcache.bench.plot import Curve, draw
    from vcache.bench.transfer_rows import curves

    lines = curves(rows)
    if bounced:
        points = [(row["nbytes"], row["gbps"], row["gbps_low"], row["gbps_high"]) for row in bounced]
        lines.append(Curve("Mooncake over TCP (one host)", points, "dram"))
    return drawn(folder / "transfer.png", title, lambda path: draw(lines, path, title=title))


def drawn(path: Path, title: str, draw: Callable[[Path], None]) -> Lines:
    try:
        draw(path)
    except Exception as error:  # noqa: BLE001 - the tables hold all numbers
        return [f"(No figure: {error}.)", ""]
    return [f"![{title}]({path.parent.name}/{path.name})", ""]


def ratio_lines(modes: dict[str, Any], lengths: list[str], ours: str, own: str, goal_at: int = 32_768) -> Lines:
    """How the way through VCache compares; the goals are for 32k tokens."""
    others = [(mode, mode) for mode in modes if mode != ours and "missed" not in mode and "while saving" not in mode]
    head = ["at the medians", *(f"{int(length):,} tokens" for length in lengths)]
    body = []
    for mode, label in others:
        cells = []
        for length in lengths:
            if ours not in modes or not modes[ours].get(length) or not modes[mode].get(length):
                cells.append("")
                continue
            cells.append(f"{median(modes[mode][length]) / median(modes[ours][length]):.2f}")
        body.append([f"{label} / {ours}", *cells])
    lines = [*table(head, body), ""]
    long = at_size(lengths, goal_at)

    def have(mode: str) -> float | None:
        values = modes.get(mode, {}).get(long or "")
        return median(values) if values else None

    if (value := have(ours)) is None:
        return lines
    if base := have(own):
        lines.append(
            f"- {verdict(value / base <= 1.5)}: at 32k tokens {value / base:.2f} times the own prefix hit (goal: at most 1.5)"
        )
    for name in modes:
        if ("native" in name or "LMCache" in name) and "missed" not in name and (other := have(name)):
            lines.append(
                f"- {verdict(other / value >= 2)}: {other / value:.2f} times as fast as {name} at 32k tokens (goal: at least 2)"
            )
    return [*lines, ""]


def overhead_lines(parts: dict[str, Any]) -> Lines:
    """A: with VCache; C: without a connector."""
    lines: Lines = []
    for name, unit, better in (("overhead", "ms", -1), ("throughput", "tokens/s", 1), ("decoding", "tokens/s", 1)):
        found = parts.get(name, {}).get("found", {})
        if not found.get("A") or not found.get("C"):
            continue
        # Of runs that followed each other: the machine's own speed drifts.
        change = (median([a / c for a, c in zip(found["A"], found["C"], strict=False)]) - 1) * 100
        what = (
            f"time to first token of new prompts of {found['length']:,} tokens"
            if name == "overhead"
            else f"{found['requests']} new prompts of {found['length']:,} tokens, {found['new_tokens']} new tokens each, "
            f"{'saving' if name == 'throughput' else 'too short to be saved'}"
        )
        lines.append(
            f"- {verdict(better * change >= -3)}: {what}: {spread_text(found['A'])} {unit} with VCache, "
            f"{spread_text(found['C'])} without ({change:+.1f}%, median of pairs; goal: within 3%)"
        )
    return ["## With nothing to hit", "", *lines, ""] if lines else []


def equality_lines(results: dict[str, Any]) -> Lines:
    lines: Lines = []
    found = results["parts"].get("equality", {}).get("found", {})
    if "equal" in found:
        lines.append(
            f"- 16 tokens after {found['length']:,} loaded ones: equal to the own prefix hit of the instance that computed "
            f"them: {found['equal']}; to its recompute: {found['equal_to_recompute']}; another beginning gives other tokens: "
            f"{found['control_differs']}"
        )
    for way, count in results.get("first_tokens", {}).items():
        lines.append(
            f"- first tokens, {way}: {count['prompts']} prompts, all ways equal in {count['all equal']}, the last two ways "
            f"in {count['last two equal']}"
        )
    return ["## Equal tokens", "", *lines, ""] if lines else []


def grid_lines(found: dict[str, Any]) -> Lines:
    operations = [name for name in ("retrieve", "store") if name in found]
    if not operations:
        return []
    names = list(found[operations[0]])
    body = [[operation, *(f"{found[operation].get(grid, 0):,.0f}" for grid in names)] for operation in operations]
    lines = ["## Programs needed (1 GiB, 32 KiB pages, GB/s)", "", *table(["programs", *names], body), ""]
    for operation in operations:
        if (fewest := found.get(f"programs for 95%, {operation}")) is not None:
            lines.append(f"- {operation}: {fewest} programs reach 95% of the fastest")
    return [*lines, ""]


def engine_lines(found: dict[str, Any]) -> Lines:
    body = []
    for name in ("0 to 1", "1 to 0"):
        if name in found:
            each = found[name]
            what = f"retrieve {each['tokens']:,} tokens, GPU {name}"
            ms = f"{spread_text(each['retrieve_ms'], 2)}, kernels {each['kernel_ms'][0]:.2f}: {each['gbps']:.0f} GB/s"
            body.append([what, ms, each["wrong"]])
    for name, each in found.get("both at once", {}).items():
        body.append([f"both at once, {name}", spread_text(each, 2), ""])
    if short := found.get("512 tokens, 0 to 1, retrieve_ms"):
        body.append(["512 tokens, stored on GPU 0, retrieved on GPU 1", spread_text(short, 2), ""])
    if not body:
        return []
    return ["## Engines end to end", "", *table(["what", "ms, median [least-most]", "wrong tokens"], body), ""]


def fault_lines(found: dict[str, Any]) -> Lines:
    read = found.get("reader while the lender died")
    if not read:
        return []
    return [
        "## Death of a lender",
        "",
        f"GPU 1 reads while the lender on GPU 0 is killed by SIGKILL: {read['rounds']} retrieves, {read['loaded']:,} tokens "
        f"delivered, **{read['wrong']} with wrong bytes**, the longest call {1e3 * read['longest']:.0f} ms; afterwards "
        f"{found['after']['loaded']} tokens are found, in {1e3 * found['after']['seconds']:.1f} ms.",
        "",
    ]


def two_gpus_vllm(found: dict[str, Any], folder: Path) -> Lines:
    """Time to first token, clients, prefill apart from decoding."""
    if not found.get("ttft_ms"):
        return []
    modes, lengths = found["ttft_ms"], [str(length) for length in found["lengths"]]
    lines = ["## vLLM, an instance on each GPU", "", *ttft_table(modes, lengths)]
    lines += ttft_figure(modes, lengths, folder, "Time to first token on GPU 1 of prompts that GPU 0 computed")
    lines += ratio_lines(modes, lengths, "GPU 1, through VCache, VRAM of GPU 0", "GPU 1, own prefix hit")
    if clients := found.get("clients"):
        keys = ["requests", "seconds", "prompt_tokens_per_s", "new_tokens_per_s", "hit_ratio", "ttft_p50_ms", "ttft_p99_ms"]
        head = ["", "requests", "seconds", "prompt tokens/s", "new tokens/s", "hit ratio", "TTFT p50, ms", "TTFT p99, ms"]
        body = [[way, *(f"{each[key]:,}" for key in keys)] for way, each in clients.items()]
        lines += ["## Eight clients with shared documents, round-robin over both instances", "", *table(head, body), ""]
    if apart := found.get("prefill and decode"):
        keys = ["seconds", "gap_p50_ms", "gap_p99_ms", "gap_max_ms", "long_ttft_p50_ms", "long_ttft_max_ms"]
        head = ["", "seconds", "between tokens p50, ms", "p99", "most", "TTFT of long prompts p50, ms", "most"]
        body = [[way, *(f"{each[key]:,}" for key in keys)] for way, each in apart.items()]
        lines += ["## Prefill on one GPU and decoding on the other, against both on both", "", *table(head, body), ""]
    if failed := found.get("failed"):
        lines += ["Not measured:", "", *(f"- {name}: {why.splitlines()[0][:200]}" for name, why in failed.items()), ""]
    return lines


PAGES: dict[str, Callable[[dict[str, Any], Path], Lines]] = {
    "one-gpu": one_gpu_page,
    "two-gpus": two_gpus_page,
    "vllm": vllm_page,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=PAGES)
    parser.add_argument("results", type=Path)
    parser.add_argument("page", type=Path)
    arguments = parser.parse_args()
    try:
        results = json.loads(arguments.results.read_text())
    except (OSError, ValueError) as error:
        print(f"bench_pages: {arguments.results}: {error}", file=sys.stderr)
        return 1
    folder = arguments.page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lines = PAGES[arguments.kind](results, folder)
    except KeyError as error:
        print(f"bench_pages: {arguments.results} is no result of {arguments.kind}: {error} is missing", file=sys.stderr)
        return 1
    arguments.page.write_text("\n".join(lines).rstrip() + "\n")
    print(arguments.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
