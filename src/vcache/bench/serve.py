"""`vcache bench serve`: does sharing KV pay on a loaded server? The same conversations, once for each way of sharing."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ArgumentError, VCacheError
from ..segment.cuda_driver import CudaDriver
from .plot import Bar, draw_bars, size_text
from .report import Column, Report, percentile
from .serve_client import Endpoint, Sample, complete, first_model
from .serve_counters import Counted, read, read_settled
from .serve_explain import EXPLAINED, numbers, sources, times
from .serve_instances import started
from .serve_load import Load, Request, Routing, Shape
from .serve_ways import MODEL, Setup, Way, require_vllm, split, staging, unavailable

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
COLUMNS += tuple(Column(name, name, printed=False) for name in (*_FILED, "output_tokens", "runs_done", *_RATIOS, *EXPLAINED))
_WARM_UP_AT_ONCE = 2
_GROUPS = {"none": "reference", "native": "dram", "lmcache": "dram", "vcache": "direct"}
_LEGEND = (
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
    discarded: bool = False
    """It only filled the caches: no median has it."""


class Loads(NamedTuple):
    """Loads that the same servers get, one after the other."""

    make: Callable[[int], Load]
    """The load of a number, from 0. Each should have prompts of its own: those of another are cached."""
    total: int = 1
    discard: int = 0
    """The first ones, which do not count: they fill the caches."""

    def check(self) -> None:
        """Raises `ArgumentError` when none counts."""
        if not 0 <= self.discard < self.total:
            raise ArgumentError(f"{self.discard} of {self.total} loads discarded: at least one must count")


def bench_ways(
    ways: Sequence[Way],
    setup: Setup,
    loads: Loads,
    progress: Progress,
    *,
    command: str,
    title: str,
    repeats: int = 1,
    explain: bool = False,
    start_timeout: float = 1800.0,
    logs: Path | None = None,
    on_load: Callable[[Report], None] = lambda report: None,
    on_interrupt: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Start servers for each way, `repeats` times in turn and in the other order every second time; put the loads on them.

    A way that fails is a note, and the others go on. `explain`: say what times to first token are made of. `on_load` gets what
    there is after each load that counts, `on_interrupt` what there is by then. Raises `VCacheError` when all fail.
    """
    setup.check()
    loads.check()
    require_vllm()
    failed = {way: reason for way in ways if (reason := unavailable(way, setup))}
    runs: dict[Way, list[Run]] = {}

    def report(*further: str) -> Report:
        notes = [f"{way}: {reason}" for way, reason in failed.items()]
        rows = [summary(way, runs[way]) for way in ways if _any_counts(runs.get(way, ()))]
        if not rows:
            raise VCacheError("; ".join(notes))
        add_ratios(rows)
        notes = [*against_none(rows), *_told(rows, explain), *further, *notes, _memory(ways, setup), _LEGEND]
        return Report(title=title, command=command, columns=COLUMNS, rows=rows, notes=notes)

    try:
        for repeat in range(repeats):
            for way in ways if repeat % 2 == 0 else ways[::-1]:
                if way in failed:
                    continue
                step = _prefixed(progress, f"{way} {repeat + 1}/{repeats}: " if repeats > 1 else f"{way}: ")
                try:
                    with started(way, setup, start_timeout, logs, progress, repeat + 1) as endpoints:
                        for found in run_all(endpoints, MODEL, loads, step):
                            runs.setdefault(way, []).append(found)
                            if not found.discarded:
                                on_load(report())
                except VCacheError as error:
                    failed[way] = str(error)
    except KeyboardInterrupt:
        if any(map(_any_counts, runs.values())):
            on_interrupt(report("interrupted: this is what had been measured by then"))
        raise
    return report()


def bench_urls(
    urls: Sequence[str],
    model: str,
    loads: Loads,
    progress: Progress,
    *,
    command: str,
    title: str,
    explain: bool = False,
) -> Report:
    """Put the loads on servers that run. `model`: empty for the first that they offer. Raises `ServerError`."""
    loads.check()
    endpoints = [Endpoint.parse(url) for url in urls]
    name = model or asyncio.run(first_model(endpoints[0]))
    row = summary("as is", list(run_all(endpoints, name, loads, progress)))
    notes = [
        *_told([row], explain),
        f"{name} at {', '.join(urls)}, as it is: whatever else it serves meanwhile is in these numbers",
        "another run with the same --seed finds what this one left in the caches: give it another",
        _LEGEND,
    ]
    return Report(title=title, command=command, columns=COLUMNS, rows=[row], notes=notes)


def run_all(endpoints: Sequence[Endpoint], model: str, loads: Loads, progress: Progress) -> Iterator[Run]:
    """Run the loads one after the other, each when it is asked for; the servers are warmed up before the first. Raises as
    `run`."""
    for number in range(loads.total):
        step = _prefixed(progress, f"load {number + 1}/{loads.total}: " if loads.total > 1 else "")
        found = run(endpoints, model, loads.make(number), step, number == 0)
        yield found._replace(discarded=number < loads.discard)


def run(endpoints: Sequence[Endpoint], model: str, load: Load, progress: Progress, warm_up: bool = True) -> Run:
    """Warm every instance up, if asked to, then put the load on them. Blocks.

    Raises `ServerError` at the first request that fails.
    """
    try:
        return asyncio.run(_run(endpoints, model, load, progress, warm_up))
    except* VCacheError as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        failure = first
    raise failure


async def _run(endpoints: Sequence[Endpoint], model: str, load: Load, progress: Progress, warm_up: bool) -> Run:
    if warm_up:
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
    """One row: the medians of what each run gives that counts; every run, too, under `runs` where there are several."""
    each = [_numbers(found) for found in runs]
    counting = [found for found, made in zip(each, runs, strict=True) if not made.discarded]
    row: dict[str, Any] = {"way": way}
    for name in dict.fromkeys(chain.from_iterable(counting)):  # a counter may appear later than others
        values = [value for found in counting if (value := found.get(name)) is not None]
        row[name] = statistics.median(values) if values else None
    row["runs_done"] = len(counting)
    told = [found | {"discarded": made.discarded} for found, made in zip(each, runs, strict=True)]
    return row | ({"runs": told} if len(each) > 1 else {})


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
    measured: dict[str, float | None] = {"requests": len(samples)}
    for name, turns in (
        ("first", [sample.first for sample in samples if sample.turn == 0]),
        ("later", [sample.first for sample in samples if sample.turn > 0]),
    ):
        measured[f"{name}_mean_ms"] = 1e3 * statistics.fmean(turns) if turns else None
        for share in (50, 90, 99):
            measured[f"{name}_p{share}_ms"] = 1e3 * percentile(turns, share / 100) if turns else None
    own, queried = counted.own, counted.queried
    return measured | {
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
        **numbers(found.counted),
    }


def _any_counts(runs: Sequence[Run]) -> bool:
    return any(not found.discarded for found in runs)


def _told(rows: Sequence[dict[str, Any]], explain: bool) -> list[str]:
    """From where each way had its tokens, and, if that is wanted, what took the time."""
    return list(filter(None, [*map(sources, rows), *(map(times, rows) if explain else ())]))


def _memory(ways: Sequence[Way], setup: Setup) -> str:
    """Who got what."""
    parts = []
    for way in ways:
        shares = split(way, setup)
        text = f"{way}: {size_text(shares.engine)} in each instance"
        text += f", {size_text(shares.engine_host)} of host memory each" if shares.engine_host else ""
        text += f", {size_text(shares.shared_vram)} lent on each GPU" if shares.shared_vram else ""
        rings = staging(setup) if way == "vcache" else 0
        text += f", {size_text(rings)} in each for what it stages" if rings else ""
        text += f", {size_text(shares.shared_host)} of host memory shared" if shares.shared_host else ""
        parts.append(text)
    where = f"GPUs {', '.join(setup.used_devices())}" if setup.devices else "a CPU"
    return f"KV memory on {where}: " + "; ".join(parts)


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda step: progress(prefix + step)
