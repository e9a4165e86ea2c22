"""`vcache bench serve`: does sharing KV pay on a loaded server? The same conversations, once for each way of sharing."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import VCacheError
from ..segment.cuda_driver import CudaDriver
from .plot import Bar, draw_bars, size_text
from .report import Column, Report, percentile
from .serve_client import Endpoint, Sample, complete, first_model
from .serve_counters import Counted, read, read_settled
from .serve_instances import started
from .serve_load import Load, Request, Routing, Shape
from .serve_ways import MODEL, Setup, Way, require_vllm, split, unavailable

Progress = Callable[[str], None]
_MS = ",.0f"
COLUMNS: tuple[Column, ...] = (
    Column("way", "way"),
    Column("first_mean_ms", "TTFT, first turns: mean", _MS),
    Column("first_p50_ms", "p50", _MS),
    Column("first_p90_ms", "p90", _MS),
    Column("first_p99_ms", "p99", _MS),
    Column("later_mean_ms", "later turns: mean", _MS),
    Column("later_p50_ms", "p50", _MS),
    Column("later_p90_ms", "p90", _MS),
    Column("later_p99_ms", "p99", _MS),
    Column("itl_mean_ms", "ITL mean", ",.1f"),
    Column("itl_p99_ms", "p99", ",.1f"),
    Column("requests_per_second", "req/s", ",.1f"),
    Column("output_tokens_per_second", "out tok/s", ",.0f"),
    Column("hit_ratio", "hit", ".3f"),
    Column("loaded_gb", "GB", ",.1f"),
    Column("wall_s", "wall s", ",.1f"),
)
_RATIOS = {
    "first_mean_ratio": "first_mean_ms",
    "later_mean_ratio": "later_mean_ms",
    "later_p90_ratio": "later_p90_ms",
    "later_p99_ratio": "later_p99_ms",
    "itl_mean_ratio": "itl_mean_ms",
    "throughput_ratio": "requests_per_second",
}
_FILED = ("own_hit_ratio", "queried_tokens", "own_hit_tokens", "connector_hit_tokens", "stored_gb", "requests", "prompt_tokens")
COLUMNS += tuple(Column(name, name, printed=False) for name in (*_FILED, "output_tokens", "runs_done", *_RATIOS))
_WARM_UP_AT_ONCE = 2
_GROUPS = {"none": "reference", "native": "dram", "lmcache": "dram", "vcache": "direct"}
_EXPLAINED = (
    "TTFT: from sending a request to its first token, ms. ITL: between the events of a stream; its mean is taken over tokens. "
    "hit: share of the prompt tokens found in an instance's own cache or through the connector, by the servers' counters; "
    "GB: loaded through the connector, where it counts bytes"
)


class Run(NamedTuple):
    """The load, once."""

    samples: list[Sample]
    wall: float
    """Seconds from the first request to the end of the last answer."""
    counted: Counted | None


def bench_ways(
    ways: Sequence[Way],
    setup: Setup,
    load: Callable[[], Load],
    progress: Progress,
    *,
    command: str,
    title: str,
    repeats: int = 1,
    start_timeout: float = 1800.0,
    logs: Path | None = None,
    on_interrupt: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Start servers for each way, `repeats` times in turn and in the other order every second time, and put the load on them. A
    way that fails is a note, and the others go on. `on_interrupt` gets what there is by then. Raises `VCacheError` when all
    fail."""
    setup.check()
    require_vllm()
    failed = {way: reason for way in ways if (reason := unavailable(way, setup))}
    runs: dict[Way, list[Run]] = {}

    def report(*further: str) -> Report:
        notes = [f"{way}: {reason}" for way, reason in failed.items()]
        rows = [summary(way, runs[way]) for way in ways if runs.get(way)]
        if not rows:
            raise VCacheError("; ".join(notes))
        add_ratios(rows)
        notes = [*against_none(rows), *further, *notes, _memory(ways, setup), _EXPLAINED]
        return Report(title=title, command=command, columns=COLUMNS, rows=rows, notes=notes)

    try:
        for repeat in range(repeats):
            for way in ways if repeat % 2 == 0 else ways[::-1]:
                if way in failed:
                    continue
                step = _prefixed(progress, f"{way} {repeat + 1}/{repeats}: " if repeats > 1 else f"{way}: ")
                try:
                    with started(way, setup, start_timeout, logs, progress, repeat + 1) as endpoints:
                        runs.setdefault(way, []).append(run(endpoints, MODEL, load(), step))
                except VCacheError as error:
                    failed[way] = str(error)
    except KeyboardInterrupt:
        if any(runs.values()):
            on_interrupt(report("interrupted: this is what had been measured by then"))
        raise
    return report()


def bench_urls(urls: Sequence[str], model: str, load: Load, progress: Progress, *, command: str, title: str) -> Report:
    """Put the load on servers that run, once. `model`: empty for the first that they offer. Raises `ServerError`."""
    endpoints = [Endpoint.parse(url) for url in urls]
    name = model or asyncio.run(first_model(endpoints[0]))
    found = run(endpoints, name, load, progress)
    notes = [
        f"{name} at {', '.join(urls)}, as it is: whatever else it serves meanwhile is in these numbers",
        "another run with the same --seed finds what this one left in the caches: give it another",
        _EXPLAINED,
    ]
    return Report(title=title, command=command, columns=COLUMNS, rows=[summary("as is", [found])], notes=notes)


def run(endpoints: Sequence[Endpoint], model: str, load: Load, progress: Progress) -> Run:
    """Warm every instance up, then put the load on them. Blocks. Raises `ServerError` at the first request that fails."""
    try:
        return asyncio.run(_run(endpoints, model, load, progress))
    except* VCacheError as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        failure = first
    raise failure


async def _run(endpoints: Sequence[Endpoint], model: str, load: Load, progress: Progress) -> Run:
    progress("warm-up")
    await _warm_up(endpoints, model, load)
    before = await read_settled(endpoints)
    samples: list[Sample] = []

    async def go_on(request: Request | None) -> None:
        while request is not None:
            sample = await complete(endpoints[request.instance], model, request)
            samples.append(sample)
            progress(f"{len(samples)} of {load.requests} requests")
            request = load.after(request, sample.answer)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for request in load.first():
            group.create_task(go_on(request))
    wall = time.perf_counter() - began
    after = await read_settled(endpoints) if before is not None else await read(endpoints)
    return Run(samples, wall, None if before is None or after is None else after.since(before))


async def _warm_up(endpoints: Sequence[Endpoint], model: str, load: Load) -> None:
    """Have every instance do once what it will do: the same prompt on one after the other, twice, so that those that share load
    what the first computed; then several prompts of its own at a time."""
    for _ in range(2):
        for instance, endpoint in enumerate(endpoints):
            await complete(endpoint, model, load.warm_up(0, instance))
    async with asyncio.TaskGroup() as group:
        for number in range(_WARM_UP_AT_ONCE * len(endpoints)):
            instance = number % len(endpoints)
            group.create_task(complete(endpoints[instance], model, load.warm_up(1 + number, instance)))


def summary(way: str, runs: Sequence[Run]) -> dict[str, Any]:
    """One row: the medians of what each run gives; these, too, under `runs` where there are several."""
    each = [_numbers(found) for found in runs]
    row: dict[str, Any] = {"way": way, "runs_done": len(runs)}
    for name in each[0]:
        values = [value for numbers in each if (value := numbers[name]) is not None]
        row[name] = statistics.median(values) if values else None
    return row | ({"runs": each} if len(each) > 1 else {})


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add what each way has of what `none` has, where that was measured."""
    base = next((row for row in rows if row["way"] == "none"), None)
    for row in rows:
        for ratio, name in _RATIOS.items():
            row[ratio] = row[name] / base[name] if base and base.get(name) and row.get(name) is not None else None


def against_none(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each other way, where `none` was measured: the ratios that matter."""

    def told(row: dict[str, Any], ratio: str, name: str) -> str:
        return f"{name} x {row[ratio]:.2f}" if row[ratio] is not None else ""

    lines = []
    for row in rows:
        parts = (
            told(row, "first_mean_ratio", "TTFT of first turns"),
            told(row, "later_mean_ratio", "of later turns"),
            told(row, "later_p90_ratio", "their p90"),
            told(row, "later_p99_ratio", "p99"),
            told(row, "itl_mean_ratio", "ITL"),
            told(row, "throughput_ratio", "req/s"),
        )
        if row["way"] != "none" and any(parts):
            lines.append(f"{row['way']} against none: " + ", ".join(filter(None, parts)))
    return lines


def draw(report: Report, path: Path) -> None:
    """Draw the median time to first token of each way, with a line up to its p90. Raises `ConfigError` without matplotlib."""
    cases = {"first": "first turns", "later": "later turns"}

    def value(row: dict[str, Any], case: str) -> tuple[float, float, float] | None:
        median = row[f"{case}_p50_ms"]
        return None if median is None else (median, median, row[f"{case}_p90_ms"])

    bars = [Bar(row["way"], [value(row, case) for case in cases], _GROUPS.get(row["way"], "direct")) for row in report.rows]
    draw_bars(list(cases.values()), bars, path, title=report.title, unit="TTFT, ms: median, line to p90")


def find_devices(visible: str | None) -> tuple[str, ...]:
    """GPUs of this machine, as `CUDA_VISIBLE_DEVICES` (`visible`) names them; none without a driver."""
    try:
        count = CudaDriver().device_count
    except VCacheError:
        return ()
    names = [name.strip() for name in (visible or "").split(",") if name.strip()]
    return tuple((names or [str(number) for number in range(count)])[:count])


def describe(shape: Shape, routing: Routing, instances: int) -> str:
    """The load, in one line."""
    return (
        f"{shape.conversations} conversations x {shape.turns} turns, {shape.concurrency} at a time, {routing} over {instances} "
        f"instance{'s' * (instances != 1)}; {shape.systems} system prompts of {shape.system_tokens:,} tokens, "
        f"{shape.turn_tokens:,} a turn, {shape.answer_tokens} new, seed {shape.seed}"
    )


def _numbers(found: Run) -> dict[str, float | None]:
    """What the table and the files say about one run."""
    samples, counted = found.samples, found.counted or Counted(None, None, None, None, None)
    tokens = sum(sample.tokens for sample in samples)
    gaps = list(chain.from_iterable(sample.gaps for sample in samples))
    later_tokens = sum(sample.tokens - 1 for sample in samples if sample.gaps)
    numbers: dict[str, float | None] = {"requests": len(samples)}
    for name, turns in (
        ("first", [sample.first for sample in samples if sample.turn == 0]),
        ("later", [sample.first for sample in samples if sample.turn > 0]),
    ):
        numbers[f"{name}_mean_ms"] = 1e3 * statistics.fmean(turns) if turns else None
        for share in (50, 90, 99):
            numbers[f"{name}_p{share}_ms"] = 1e3 * percentile(turns, share / 100) if turns else None
    own, queried = counted.own, counted.queried
    return numbers | {
        "itl_mean_ms": 1e3 * sum(gaps) / later_tokens if later_tokens else None,
        "itl_p99_ms": 1e3 * percentile(gaps, 0.99) if gaps else None,
        "requests_per_second": len(samples) / found.wall,
        "output_tokens_per_second": tokens / found.wall,
        "prompt_tokens": sum(sample.prompt_tokens for sample in samples),
        "output_tokens": tokens,
        "hit_ratio": counted.hit_ratio,
        "own_hit_ratio": own / queried if queried and own is not None else None,
        "queried_tokens": queried,
        "own_hit_tokens": own,
        "connector_hit_tokens": counted.connector,
        "loaded_gb": None if counted.loaded_bytes is None else counted.loaded_bytes / 1e9,
        "stored_gb": None if counted.stored_bytes is None else counted.stored_bytes / 1e9,
        "wall_s": found.wall,
    }


def _memory(ways: Sequence[Way], setup: Setup) -> str:
    """Who got what."""
    parts = []
    for way in ways:
        shares = split(way, setup)
        text = f"{way}: {size_text(shares.engine)} in each instance"
        text += f", {size_text(shares.engine_host)} of host memory each" if shares.engine_host else ""
        text += f", {size_text(shares.shared_vram)} lent on each GPU" if shares.shared_vram else ""
        text += f", {size_text(shares.shared_host)} of host memory shared" if shares.shared_host else ""
        parts.append(text)
    where = f"GPUs {', '.join(setup.used_devices())}" if setup.devices else "a CPU"
    return f"KV memory on {where}: " + "; ".join(parts)


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda step: progress(prefix + step)
