"""`vcache bench ...`: measurements of VCache on this machine, each beside what it must be compared with, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..config import ByteSize
from ..errors import ArgumentError
from .exits import guarded
from .options import CsvFile, JsonFile, parse_size

if TYPE_CHECKING:
    from ..bench.report import Report

_FILE_WIDTH = 140
_ONE_GIB = ByteSize(2**30)
_SIXTEEN_GIB = ByteSize(2**34)
_QUARTER_GIB = ByteSize(2**28)

bench = typer.Typer(
    help="Measure VCache beside what it must be compared with.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


@bench.command()
@guarded
def manager(
    keys_per_request: Annotated[int, typer.Option(min=1, max=4096, help="Keys in one request.")] = 128,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each run.")] = 3.0,
    chunks: Annotated[int, typer.Option(min=4096, help="Chunks that the manager knows.")] = 100_000,
    json: JsonFile = None,
    csv: CsvFile = None,
) -> None:
    """Key look-ups per second of one manager.

    One core serves, another drives it over a unix socket, with a lease for each request; beside mooncake_master, where it is
    installed, on the same two cores.
    """
    from ..bench.manager import bench_manager

    with _progress() as progress:
        report = bench_manager(keys_per_request, seconds, chunks, progress)
    _finish(report, json, csv)


@bench.command()
@guarded
def memory(
    chunks: Annotated[int, typer.Option(min=1000, help="Chunks to mount.")] = 1_000_000,
    json: JsonFile = None,
    csv: CsvFile = None,
) -> None:
    """Memory that a chunk costs the manager, in bytes."""
    from ..bench.memory import bench_memory

    with _progress() as progress:
        report = bench_memory(chunks, progress)
    _finish(report, json, csv)


@bench.command()
@guarded
def storage(
    sizes: Annotated[
        list[ByteSize] | None,
        typer.Option("--size", parser=parse_size, metavar="SIZE", help="Bytes moved in each round; may be repeated."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 9,
    hits: Annotated[
        int, typer.Option(min=0, help="Instead: calls in a round, of hits of the pool, with and without a storage tier.")
    ] = 0,
    json: JsonFile = None,
    csv: CsvFile = None,
) -> None:
    """Storage tier: put and get, beside raw Mooncake.

    Starts a mooncake_master and a lender of its own; batched calls with the same buffers, in turns. With --hits: what hits of
    the pool lose while the store is idle, saturated or dead. Needs Mooncake.
    """
    with _progress() as progress:
        if hits:
            from ..bench.storage_hits import bench_storage_hits

            report = bench_storage_hits(rounds, hits, progress)
        else:
            from ..bench.storage import bench_storage

            report = bench_storage(sizes or [_QUARTER_GIB], rounds, progress)
    _finish(report, json, csv)


@bench.command()
@guarded
def lookup(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 131_072,
    chunk_size: Annotated[int, typer.Option(min=1, max=65535, help="Tokens in a chunk.")] = 256,
    json: JsonFile = None,
    csv: CsvFile = None,
) -> None:
    """Look-up of a long prompt, hashing included.

    All of its chunks are there, among 100,000 others, in a manager in another process.
    """
    from ..bench.lookup import bench_lookup

    with _progress() as progress:
        report = bench_lookup(tokens, chunk_size, progress)
    _finish(report, json, csv)


@bench.command()
@guarded
def engine(
    nbytes: Annotated[
        ByteSize, typer.Option("--bytes", parser=parse_size, metavar="SIZE", help="KV to store and retrieve.")
    ] = _ONE_GIB,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each measurement; the median counts.")] = 5,
    json: JsonFile = None,
    csv: CsvFile = None,
) -> None:
    """Store in one process, retrieve in another.

    Over host memory that a third process lends: whole blocks and random slot mappings, beside a plain copy of the same bytes.
    """
    from ..bench.engine import bench_engine

    with _progress() as progress:
        report = bench_engine(nbytes, repeats, progress)
    _finish(report, json, csv)


@bench.command()
@guarded
def transfer(
    sizes: Annotated[
        list[ByteSize] | None,
        typer.Option("--size", parser=parse_size, metavar="SIZE", help="Bytes of KV in a request; may be repeated."),
    ] = None,
    pages: Annotated[
        list[ByteSize] | None,
        typer.Option("--page", parser=parse_size, metavar="SIZE", help="Bytes of a block in a region; may be repeated."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Also 4 GiB, and copy engines.")] = False,
    interference: Annotated[bool, typer.Option("--interference", help="Also what running work loses.")] = False,
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="Also whole engines in processes of their own.")] = False,
    grid: Annotated[int, typer.Option(min=0, help="Programs of the mover's launch; 0 = its default for the link.")] = 0,
    device: Annotated[int, typer.Option(min=-1, help="GPU that holds the paged cache; -1 = the first, or the CPU.")] = -1,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw GB/s over size (.svg, .png, .pdf).")] = None,
    json: JsonFile = None,
    csv: CsvFile = None,
) -> None:
    """Every path that KV can take on this machine.

    By size and page size, beside plain copies of the same bytes. One to four minutes on a GPU; seconds without one.
    """
    import sys

    from ..bench.transfer import TransferOptions, curves, run

    chosen = TransferOptions(
        full=full, copy_engines=full, interference=interference, end_to_end=end_to_end, grid=grid, device=device
    )
    chosen = chosen._replace(command=" ".join(["vcache", *sys.argv[1:]]))
    if sizes:
        chosen = chosen._replace(sizes=tuple(sizes))
    if pages:
        chosen = chosen._replace(page_sizes=tuple(pages))
    with _progress() as progress:
        report = run(chosen, progress)
    if plot is not None:
        from ..bench.plot import draw

        draw(curves(report.rows), plot, title=report.title)
    _finish(report, json, csv)


@bench.command()
@guarded
def trace(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Traces of Mooncake or Bailian: .jsonl or .jsonl.xz.")],
    capacities: Annotated[
        list[str] | None,
        typer.Option(
            "--capacity", metavar="SHARE|SIZE", help="10% of the trace's different blocks, or bytes; may be repeated."
        ),
    ] = None,
    policies: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="EVICTION[+ADMISSION]", help="As in manager.eviction, .admission; may be repeated."),
    ] = None,
    token_bytes: Annotated[int, typer.Option(min=1, help="KV of a token, for capacities in bytes.")] = 131_072,
    requests: Annotated[int, typer.Option(min=0, help="Replay only so many, from the beginning; 0 = all.")] = 0,
    json: JsonFile = None,
    csv: CsvFile = None,
) -> None:
    """Hit ratios over traces of real requests.

    Replays them against the manager's directory, in this process, with the trace's clock, for several capacities and policies,
    each beside plain LRU. Needs no memory to lend; the result depends on no machine.
    """
    import sys

    from ..bench.trace import POLICIES, SHARES, bench_trace, policy_of
    from ..bench.trace_files import read_trace

    chosen = [policy_of(name) for name in policies or POLICIES]
    with _progress() as progress:
        traces = [read_trace(file, requests) for file in files]
        command = " ".join(["vcache", *sys.argv[1:]])
        report = bench_trace(traces, capacities or SHARES, chosen, token_bytes, progress, command)
    _finish(report, json, csv)


@bench.command()
@guarded
def serve(
    model: Annotated[str, typer.Option(help="Started servers: a folder or a name. With --url: the name to ask for.")] = "",
    urls: Annotated[
        list[str] | None, typer.Option("--url", metavar="URL", help="Instead: a server that runs; may be repeated.")
    ] = None,
    ways: Annotated[
        list[str] | None, typer.Option("--way", help="none, native, lmcache or vcache; may be repeated. Default: all.")
    ] = None,
    routing: Annotated[
        Literal["random", "round-robin", "prefix-aware"],
        typer.Option(help="Where a turn goes; prefix-aware: a conversation stays, beside others with its system prompt."),
    ] = "random",
    instances: Annotated[int, typer.Option(min=1, help="Servers that are started.")] = 2,
    kv_memory: Annotated[
        ByteSize, typer.Option(parser=parse_size, metavar="SIZE", help="For KV in all instances and VRAM that is lent.")
    ] = _SIXTEEN_GIB,
    host_memory: Annotated[
        ByteSize, typer.Option(parser=parse_size, metavar="SIZE", help="Host memory for KV, for the ways that use it.")
    ] = _SIXTEEN_GIB,
    pool_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Of --kv-memory, what VCache lends. Default: half on GPUs, 0 on a CPU.")
    ] = "",
    conversations: Annotated[int, typer.Option(min=1)] = 48,
    turns: Annotated[int, typer.Option(min=1, help="Of each conversation.")] = 5,
    systems: Annotated[int, typer.Option(min=1, help="System prompts that the conversations share.")] = 12,
    system_tokens: Annotated[int, typer.Option(min=0, help="Length of a system prompt.")] = 6000,
    turn_tokens: Annotated[int, typer.Option(min=1, help="What a turn adds.")] = 1500,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Generated in a turn.")] = 64,
    spread: Annotated[float, typer.Option(min=0.0, max=0.99, help="Lengths differ by up to this share.")] = 0.25,
    concurrency: Annotated[int, typer.Option(min=1, help="Conversations at a time.")] = 12,
    seed: Annotated[int, typer.Option(help="Decides prompts, lengths, order and routes.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each way, in turn, on new servers; medians count.")] = 1,
    loads: Annotated[
        int, typer.Option(min=1, help="Loads in a row on the same servers, of seeds that follow; medians count.")
    ] = 1,
    discard: Annotated[int, typer.Option(min=0, help="Of these, the first ones do not count: they fill the caches.")] = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Also say what times to first token are made of.")] = False,
    start_timeout: Annotated[float, typer.Option(min=1.0, help="Seconds until a server must answer.")] = 1800.0,
    serve_args: Annotated[
        list[str] | None, typer.Option("--serve-arg", metavar="ARG", help="Further argument of vLLM; may be repeated.")
    ] = None,
    vcache_options: Annotated[
        list[str] | None,
        typer.Option("--vcache-option", metavar="KEY=VALUE", help="Further option of VCache's connector; may be repeated."),
    ] = None,
    logs: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Keep the servers' logs here.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw TTFT (.svg, .png, .pdf).")] = None,
    json: JsonFile = None,
    csv: CsvFile = None,
) -> None:
    """Chats on loaded vLLM servers, with and without sharing KV.

    Conversations over shared system prompts, each turn asked when the one before is answered. Starts servers without sharing,
    with vLLM's own offloading, with LMCache (where installed) and with VCache, one after the other, at equal VRAM and host
    memory; or measures servers that run, as they are.
    """
    import os
    import sys

    from ..bench.report import save_report
    from ..bench.serve import Loads, bench_urls, bench_ways, describe, draw, find_devices
    from ..bench.serve_load import Load, Shape
    from ..bench.serve_ways import Setup, chosen_ways, option
    from ..children.stops import stop_signals

    shape = Shape(conversations, turns, systems, system_tokens, turn_tokens, answer_tokens, spread, concurrency, seed)
    count = len(urls) if urls else instances
    command, title = " ".join(["vcache", *sys.argv[1:]]), describe(shape, routing, count)
    row = Loads(lambda number: Load(shape._replace(seed=seed + number), count, routing), loads, discard)
    with stop_signals(), _progress() as progress:
        if urls:
            if ways:
                raise ArgumentError("--way and --url: servers that run are measured as they are; leave --way out")
            report = bench_urls(urls, model, row, progress, command=command, title=title, explain=explain)
        else:
            if not model:
                raise ArgumentError("--model names what the servers shall serve; or give --url for servers that run")
            kept = json if str(json) != "-" else None  # at once: what ends this the hard way does not end that
            devices = find_devices(os.environ.get("CUDA_VISIBLE_DEVICES"))
            setup = Setup(
                model,
                instances,
                kv_memory,
                host_memory,
                _pool_size(pool_memory, kv_memory, bool(devices)),
                Load(shape, count, routing).longest,
                devices,
                tuple(serve_args or ()),
                dict(map(option, vcache_options or ())),
            )
            report = bench_ways(
                chosen_ways(ways or ()),
                setup,
                row,
                progress,
                command=command,
                title=title,
                repeats=repeats,
                explain=explain,
                start_timeout=start_timeout,
                logs=logs,
                on_load=lambda report: save_report(report, kept),
                on_interrupt=lambda report: _finish(report, json, csv),
            )
    _finish(report, json, csv)
    if plot is not None:
        draw(report, plot)


def _pool_size(text: str, kv_memory: int, devices: bool) -> int:
    """`--pool-memory`: half of the memory on GPUs, nothing on a CPU, unless it is said."""
    if not text:
        return kv_memory // 2 if devices else 0
    return 0 if text == "0" else parse_size(text)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr with the current step; nothing where stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as line:
        yield lambda step: line.update(step)


def _finish(report: Report, json: Path | None, csv: Path | None) -> None:
    """The table goes to stdout, unless a file that was asked for does."""
    from rich.console import Console

    from ..bench.report import print_report, save_report

    console = Console(stderr="-" in (str(json), str(csv)))
    print_report(report, console if console.is_terminal else Console(file=console.file, width=_FILE_WIDTH))
    save_report(report, json, csv)
