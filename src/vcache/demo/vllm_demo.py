"""The demo with vLLM: real servers, a real pool, the story, the verdict."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from . import model, vllm_report
from .engines import describe
from .processes import Process, guarded
from .stage import Stage
from .vllm_instance import Hardware, Instance, arguments, environment
from .vllm_pool import Pool, pool_bytes
from .vllm_scenario import Results, play

CONVERSION = 600.0


def converted_model(stage: Stage, folder: Path, cache: Path) -> str:
    """Folder with the model as vLLM reads it; converts it once, in a process of its own. Raises `DemoError`."""

    def convert(source: Path, out: Path) -> None:
        with stage.step("convert the language model, once"):
            with Process("converter", guarded("vcache.demo.model", str(source), str(out)), folder) as converter:
                converter.finish(CONVERSION)

    found, _ = model.prepare(cache, model.gguf_file(), convert, lambda: None)
    return str(found)


def run(stage: Stage, folder: Path, *, hardware: Hardware, tokens: int, cache: Path) -> Results:
    """Play the story with two servers; all processes are gone when it returns or raises. Raises `DemoError`."""
    stage.console.print(f"Two instances on {describe(hardware)}, with SmolLM2-135M-Instruct.", highlight=False)
    model_dir = converted_model(stage, folder, cache)
    with ExitStack() as stack:
        size = pool_bytes(model_dir, hardware.dtype, tokens)
        pool = Pool(stack, folder, "cuda" if hardware.on_gpu else "host", size)

        def start(number: int) -> Instance:
            name = f"vllm-{'ab'[number]}"
            options = arguments(model_dir, folder / f"{name}.sock", pool.address, hardware)
            return stack.enter_context(Instance(name, folder, options, environment(folder, hardware, number)))

        return play(stage, pool, start, tokens)


def verdict(stage: Stage, results: Results) -> list[str]:
    """Print table and result; everything that went wrong."""
    stage.console.print(vllm_report.render(results))
    found = vllm_report.problems(results)
    if not found:
        stage.console.print(f"[green]{vllm_report.summary(results)}[/green]", highlight=False)
    return found
