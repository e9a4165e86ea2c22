"""What the tests on real engines share: a pool, the engines A and B, a bench for others, and what to expect of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.cluster import Command
from tiny_models import prompt
from vllm_harness import CHUNK, START, EngineProcess, connector

LENGTH = 300
"""Tokens of a prompt: 4 whole chunks of 64, and a rest."""
WHOLE = LENGTH // CHUNK * CHUNK
COUNT = 48


def prompts(first: int, count: int = 3) -> list[list[int]]:
    return [prompt(seed, LENGTH) for seed in range(first, first + count)]


class Pool:
    """A manager that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"unix://{folder}/manager.sock"
        self.start()

    def start(self) -> None:
        self.command = Command(self.folder, "serve", "--address", self.address)
        self.command.wait_for("manager ready")

    def kill(self) -> None:
        self.command.kill()


class Bench:
    """A process that runs one engine after another."""

    def __init__(self, folder: Path) -> None:
        self.runtime = folder / "runtime"
        self.runtime.mkdir(mode=0o700)
        self.process = EngineProcess(folder, "bench", XDG_RUNTIME_DIR=str(self.runtime))

    def engine(self, model: str, config: dict[str, Any] | None, **options: Any) -> EngineProcess:
        self.process.call("stop")
        self.process.call("start", START, model=model, connector=config, **options)
        return self.process


def start_b(folder: Path, pool: Pool, llama: str) -> EngineProcess:
    engine = EngineProcess(folder, "b")
    config = connector(pool.address, sync_load_budget="1GiB", **{"segment.lend": False})
    engine.call("start", START, model=llama, connector=config)
    return engine


class B:
    """The second engine, which some tests replace."""

    def __init__(self, folder: Path, pool: Pool, llama: str) -> None:
        self.arguments = folder, pool, llama
        self.process = start_b(*self.arguments)

    def again(self) -> None:
        self.process.kill()
        self.process = start_b(*self.arguments)


def check(result: dict[str, Any], first: int, reference: list[list[int]], cached: int | None = None) -> None:
    count = len(result["tokens"])
    assert result["tokens"] == reference[first : first + count]
    if cached is not None:
        assert result["cached"] == [cached] * count


def counted(result: dict[str, Any], name: str) -> float:
    return result["counters"].get(f"vllm:vcache_{name}", 0)


def computed_by(engine: EngineProcess, first: int, reference: list[list[int]], count: int = 3) -> None:
    """Let an engine compute prompts that nobody has, and save them."""
    result = engine.call("generate", prompts=prompts(first, count))
    check(result, first, reference, cached=0)
    engine.call("settle")
