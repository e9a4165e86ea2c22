"""The commands and their options. Each body imports what it needs when it runs: `vcache --help` loads typer and little else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import __version__
from ..config import ByteSize
from .bench import bench
from .exits import Exit, guarded
from .old_names import Commands
from .options import Address, ConfigFile, load_config, parse_size

# Help without rich markup: it opens in a third of the time, and usage errors do not load rich either.
app = typer.Typer(
    name="vcache",
    cls=Commands,
    help="KV cache shared by LLM inference engines at VRAM level.",
    epilog="Start with: vcache serve, then vcache lend, then vcache status. `vcache doctor` says what works on this machine.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.add_typer(bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vcache {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """KV cache shared by LLM inference engines at VRAM level."""


@app.command()
@guarded
def serve(
    config: ConfigFile = None,
    address: Address = None,
    metrics_port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Prometheus metrics over HTTP on this port; 0 = off.")
    ] = None,
    eviction: Annotated[
        Literal["lru", "sieve"] | None, typer.Option(help="Which chunks go first when the pool is full.")
    ] = None,
    with_mooncake: Annotated[
        bool,
        typer.Option("--with-mooncake", help="Also run a mooncake_master, at storage.options.master (127.0.0.1:50051)."),
    ] = False,
    mooncake_ssd: Annotated[
        bool, typer.Option("--mooncake-ssd", help="With --with-mooncake: the master takes lenders with an SSD, and only such.")
    ] = False,
    idle_exit: Annotated[
        float,
        typer.Option(
            "--idle-exit", min=0, metavar="SECONDS", help="End when nothing has been connected for so long; 0 = never."
        ),
    ] = 0.0,
) -> None:
    """Run the manager, one for each host.

    Ends on Ctrl-C or SIGTERM. Prints one line once it answers. A restart loses nothing: lenders and engines come back by
    themselves and report what their memory holds.
    """
    from .serve import serve_until_stopped

    if mooncake_ssd and not with_mooncake:
        raise typer.BadParameter("--mooncake-ssd: only with --with-mooncake")
    manager = {"address": address, "metrics_port": metrics_port, "eviction": eviction}
    serve_until_stopped(
        load_config(config, manager=manager), with_mooncake=with_mooncake, mooncake_ssd=mooncake_ssd, idle_exit=idle_exit
    )


@app.command()
@guarded
def lend(
    config: ConfigFile = None,
    kind: Annotated[
        Literal["auto", "cuda", "host"] | None,
        typer.Option(help="Memory to lend: VRAM of a GPU, host memory, or (auto) VRAM where there is a usable GPU."),
    ] = None,
    size: Annotated[
        ByteSize | None,
        typer.Option("--size", parser=parse_size, metavar="SIZE", help="How much, such as 2GiB. Default: segment.size."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="N|GPU-UUID", help="Which GPU, by number or UUID. Default: the first.")
    ] = None,
    slab_size: Annotated[
        ByteSize | None,
        typer.Option(
            "--slab-size", parser=parse_size, metavar="SIZE", help="Unit of growth and return. Default: segment.slab_size."
        ),
    ] = None,
    address: Address = None,
    prefault: Annotated[
        bool, typer.Option("--prefault", help="Touch all host memory now: slower start, faster first writes.")
    ] = False,
    name: Annotated[str | None, typer.Option(metavar="TEXT", help="Shown in `vcache status`. Default: lend-PID.")] = None,
    remote: Annotated[
        Literal["off", "tcp", "rdma"] | None,
        typer.Option(help="Let engines on other hosts read it, by Mooncake's transfer engine. Default: segment.remote."),
    ] = None,
    remote_host: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="With --remote: address of this host for the others. Default: segment.remote_host."
        ),
    ] = None,
) -> None:
    """Lend memory to the pool until Ctrl-C or SIGTERM.

    A process of its own that holds the chunks: engines come and go, and so may the manager, without losing one. To lend to a
    storage tier, see `vcache lend-storage`.
    """
    from .lend import lend_until_stopped

    segment = {"kind": kind, "size": size, "slab_size": slab_size, "remote": remote, "remote_host": remote_host}
    settings = load_config(config, manager={"address": address}, segment=segment)
    lend_until_stopped(settings, device=device, prefault=prefault, name=name)


@app.command("lend-storage")
@guarded
def lend_storage(
    config: ConfigFile = None,
    size: Annotated[
        ByteSize | None,
        typer.Option(
            "--size", parser=parse_size, metavar="SIZE", help="How much memory, such as 64GiB. Default: segment.size."
        ),
    ] = None,
    ssd: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="What is evicted from the memory lent goes to this folder.")
    ] = None,
    ssd_size: Annotated[
        ByteSize | None,
        typer.Option(
            "--ssd-size", parser=parse_size, metavar="SIZE", help="How much of it, such as 500GiB. Needed with --ssd."
        ),
    ] = None,
    address: Annotated[str | None, typer.Option("--address", "-a", hidden=True)] = None,
) -> None:
    """Lend host memory to a Mooncake store.

    Until Ctrl-C or SIGTERM, to the store at storage.options.master. Needs no manager and no GPU. `vcache lend --tier storage`
    is the same command.
    """
    from ..storage.ssd import Ssd
    from .lend_storage import lend_storage_until_stopped

    if (ssd is None) != (ssd_size is None):
        raise typer.BadParameter("--ssd FOLDER and --ssd-size SIZE go together")
    below = Ssd(ssd.absolute(), ssd_size) if ssd is not None and ssd_size is not None else None
    lend_storage_until_stopped(load_config(config, manager={"address": address}, segment={"size": size}), below)


@app.command()
@guarded
def status(
    config: ConfigFile = None,
    address: Address = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Between refreshes with --watch.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (with --watch: a line for each refresh).")] = False,
) -> None:
    """Show segments, sessions, counters and the hit ratio. Exit code 3 when the manager cannot be reached."""
    from .status import show_status

    show_status(load_config(config, manager={"address": address}), interval=interval if watch else None, as_json=as_json)


@app.command()
@guarded
def story(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A printed key, vc1-<namespace>-<digest>, or its digest alone.")],
    config: ConfigFile = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what happened to a chunk.

    Who stored, moved or read it, and where it is now, as far back as the manager's log reaches. Exit code 1 when the manager
    knows nothing of it.
    """
    from .story import show_story

    show_story(load_config(config, manager={"address": address}), key, as_json=as_json)


@app.command()
@guarded
def resize(
    segment: Annotated[str, typer.Argument(metavar="SEGMENT", help="UUID of the segment, or the first digits of it.")],
    size: Annotated[
        ByteSize,
        typer.Option("--size", parser=parse_size, metavar="SIZE", help="New size, such as 1GiB. Rounded to whole slabs."),
    ],
    config: ConfigFile = None,
    address: Address = None,
    timeout: Annotated[float, typer.Option(min=0.0, metavar="SECONDS", help="How long to wait for the lender.")] = 30.0,
) -> None:
    """Change the size of a lent segment.

    Asks its lender, and follows it until it is done. Chunks in slabs that it returns become misses.
    """
    from .admin import resize_segment

    resize_segment(load_config(config, manager={"address": address}), segment, size, timeout)


@app.command()
@guarded
def clear(
    namespace: Annotated[
        str | None, typer.Option(metavar="HEX", help="Only chunks of this namespace (32 hex digits, as in printed keys).")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All chunks of all namespaces.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: ConfigFile = None,
    address: Address = None,
) -> None:
    """Forget chunks.

    In VRAM and DRAM, also across a restart of the manager. Readers under way get misses. Does not touch the storage tier.
    """
    from .admin import clear_chunks

    if (namespace is None) == (not everything):
        raise typer.BadParameter("give either --namespace HEX or --all")
    clear_chunks(load_config(config, manager={"address": address}), namespace, ask=not yes)


@app.command()
@guarded
def doctor(
    config: ConfigFile = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine and say what to do.

    What works, what does not, and why it matters. Exit code 1 when a check fails.
    """
    import json

    from .checks import Check, print_check, run_checks, summary
    from .checks import as_json as checks_as_json
    from .doctor import CHECKERS

    found: list[Check] = []
    for check in run_checks(load_config(config, manager={"address": address}), CHECKERS):
        found.append(check)
        if not as_json:
            print_check(check)
    typer.echo(json.dumps(checks_as_json(found), indent=2) if as_json else summary(found))
    if any(check.status == "fail" for check in found):
        raise typer.Exit(Exit.FAILED)


@app.command()
@guarded
def demo(
    engine: Annotated[
        Literal["auto", "vllm", "torch"],
        typer.Option(help="vllm: two vLLM servers; torch: the demo's own runner; auto: vLLM if it is installed."),
    ] = "auto",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where the model runs; auto: a GPU if there is one.")
    ] = "auto",
    tokens: Annotated[int, typer.Option(metavar="N", help="About how long the shared document is.")] = 5800,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH",
            help="Chat model for vLLM: a folder, or a name on the Hugging Face hub.",
            show_default="SmolLM2-135M-Instruct",
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the folder with the logs of all processes; on failure it stays anyway.")
    ] = False,
) -> None:
    """Two inference engines share one document.

    Two processes, each with a real model: what the first computes, the second loads and continues; then the first and the
    manager are killed and started anew, and the hit is shown again. Fails when an answer differs or a hit is missing. Takes two
    to four minutes with vLLM on a CPU, one with torch; longer with a larger model.
    """
    from ..demo.main import run

    raise typer.Exit(run(engine=engine, device=device, tokens=tokens, model_name=model, keep=keep))
