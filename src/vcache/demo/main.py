"""`vcache demo`: what the command line calls. Imports neither torch, vLLM nor transformers: the processes do."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ..errors import ArgumentError
from . import document, engines, model, report, scenario, vllm_demo
from .messages import DemoError
from .stage import Stage
from .stops import stop_signals
from .vllm_model import ChatModel, chat_model

DEVICES = ("auto", "cpu", "cuda")


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
        if choice.engine == "vllm":
            problems = _play_vllm(Stage(console), folder, device, tokens, given)
        else:
            problems = _play_torch(Stage(console), folder, device, tokens)
        for problem in problems:
            console.print(f"[red]FAILED[/red] {escape(problem)}", highlight=False)
        if problems:
            keep_logs()
    return 1 if problems else 0


def _play_vllm(stage: Stage, folder: Path, device: str, tokens: int, given: ChatModel | None) -> list[str]:
    hardware = engines.find_hardware(device)
    results = vllm_demo.run(stage, folder, hardware=hardware, tokens=tokens, cache=model.cache_folder(), given=given)
    return vllm_demo.verdict(stage, results, close_times=hardware.on_gpu and given is None)


def _play_torch(stage: Stage, folder: Path, device: str, tokens: int) -> list[str]:
    results = scenario.play(stage, folder, device=device, tokens=tokens, cache_dir=model.cache_folder())
    questions = (document.FIRST_QUESTION.text, document.SECOND_QUESTION.text)
    stage.console.print(report.render(results, scenario.BLOCK_SIZES, questions))
    problems = report.problems(results)
    if not problems:
        stage.console.print("[green]All answers are equal to the ones without a cache, before and after the restart.[/green]")
    return problems


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
