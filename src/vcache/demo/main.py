"""`vcache demo`: what the command line calls. Imports neither torch nor transformers: the workers do."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from ..errors import ArgumentError
from . import document, model, report
from .messages import DemoError
from .scenario import BLOCK_SIZES, play
from .stage import Stage

DEVICES = ("auto", "cpu", "cuda")


def run(*, device: str = "auto", tokens: int = 5800, keep: bool = False, console: Console | None = None) -> int:
    """Play the demo, print its table; 0 when everything was as promised, else 1. Blocks for about a minute.

    `device`: `auto` takes a GPU when torch finds one. `tokens`: about how long the shared document is. `keep`: leave the
    folder with the logs of all processes. Raises `ArgumentError` for wrong options and `DemoError` (both `VCacheError`s) when
    the demo cannot be played. All processes it started are gone when it returns or raises.
    """
    if device not in DEVICES:
        raise ArgumentError(f"--device: must be one of {', '.join(DEVICES)}, got {device!r}")
    if not document.MIN_TOKENS <= tokens <= document.MAX_TOKENS:
        raise ArgumentError(f"--tokens: must be in [{document.MIN_TOKENS}, {document.MAX_TOKENS}], got {tokens}")
    if missing := model.missing_packages():
        raise DemoError(f"the demo needs the packages {', '.join(missing)}; {model.INSTALL}")
    console = console or Console()
    folder = Path(tempfile.mkdtemp(prefix="vcache-demo-"))
    try:
        results = play(Stage(console), folder, device=device, tokens=tokens, cache_dir=model.cache_folder())
    finally:
        if keep:
            console.print(f"logs: {folder}", highlight=False)
        else:
            shutil.rmtree(folder)
    questions = (document.FIRST_QUESTION.text, document.SECOND_QUESTION.text)
    console.print(report.render(results, BLOCK_SIZES, questions))
    problems = report.problems(results)
    for problem in problems:
        console.print(f"[red]FAILED[/red] {problem}", highlight=False)
    if not problems:
        console.print("[green]All answers are equal to the ones without a cache, before and after the restart.[/green]")
    return 1 if problems else 0
