"""The demo with vLLM: real servers, a real pool, the story, the verdict."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from rich.markup import escape

from . import model, vllm_report
from .engines import describe
from .processes import Process, guarded
from .stage import Stage
from .vllm_instance import START, Hardware, Instance, arguments, environment
from .vllm_model import ChatModel, cache_bytes, pool_bytes, read_config, token_bytes
from .vllm_pool import Pool
from .vllm_scenario import Results, play

CONVERSION = 600.0
START_LARGE = 3600.0
"""Seconds within which a server with the user's model must answer: it may have to fetch many GB. One that fails ends sooner."""


def converted_model(stage: Stage, folder: Path, cache: Path) -> str:
    """Folder with the model as vLLM reads it; converts it once, in a process of its own. Raises `DemoError`."""

    def convert(source: Path, out: Path) -> None:
        with stage.step("convert the language model, once"):
            with Process("converter", guarded("vcache.demo.model", str(source), str(out)), folder) as converter:
                converter.finish(CONVERSION)

    found, _ = model.prepare(cache, model.gguf_file(), convert, lambda: None)
    return str(found)


def run(stage: Stage, folder: Path, *, hardware: Hardware, tokens: int, cache: Path, given: ChatModel | None = None) -> Results:
    """Play the story with two servers that have the model `given`, or the demo's own. All processes are gone when it returns or
    raises. Raises `DemoError`."""
    what = model.NAME if given is None else given.name
    fetched = ", fetched from the Hugging Face hub unless it is in its cache" if given and given.on_hub else ""
    stage.console.print(escape(f"Two instances on {describe(hardware)}, with {what}{fetched}."), highlight=False)
    if given is None:
        served = ChatModel(converted_model(stage, folder, cache), on_hub=False)
        config = json.loads((Path(served.name) / "config.json").read_text())
    else:
        served = given
        with stage.step("read the model's configuration"):
            config = read_config(folder, given)
    per_token = token_bytes(config, hardware.dtype)
    kept, limit = cache_bytes(per_token), START if given is None else START_LARGE
    with ExitStack() as stack:
        pool = Pool(stack, folder, "cuda" if hardware.on_gpu else "host", pool_bytes(per_token, tokens))

        def start(number: int) -> Instance:
            name = f"vllm-{'ab'[number]}"
            options = arguments(served.name, folder / f"{name}.sock", pool.address, hardware, kept)
            env = environment(folder, hardware, number, kept)
            return stack.enter_context(Instance(name, folder, options, env, offline=not served.on_hub, start=limit))

        return play(stage, pool, start, tokens)


def verdict(stage: Stage, results: Results, *, close_times: bool) -> list[str]:
    """Print table and result; everything that went wrong. `close_times`: say why the model makes no difference in them."""
    stage.console.print(vllm_report.render(results))
    if close_times:
        stage.console.print(vllm_report.CLOSE_TIMES, highlight=False)
    found = vllm_report.problems(results)
    if not found:
        stage.console.print(f"[green]{vllm_report.summary(results)}[/green]", highlight=False)
    return found
