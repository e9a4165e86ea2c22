"""What the documents say, compared with the source: keys, defaults, counters, errors, links, commands, examples."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import pytest

from vcache import errors
from vcache.config import ByteSize, VCacheConfig, sections
from vcache.metrics import COUNTERS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def table(page: Path, heading: str) -> list[list[str]]:
    """Rows of the tables on a page whose first column's heading is `heading`; cells without surrounding blanks."""
    rows: list[list[str]] = []
    inside = False
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            inside = False
        elif inside and not set(cells[0]) <= set("-:"):
            rows.append(cells)
        elif cells[0] == heading:
            inside = True
    return rows


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return '""' if value == "" else str(value)


def defaults() -> dict[str, str]:
    config = VCacheConfig()
    return {
        f"{section}.{key}": written(getattr(getattr(config, section), key))
        for section, kind in sections().items()
        for key in kind.__struct_fields__
    }


def test_every_configuration_key_is_documented_with_its_default() -> None:
    found = {code(row[0])[0]: code(row[1])[0] for row in table(DOCS / "configuration.md", "key")}
    assert found == defaults()


def test_keys_in_the_readme_exist_and_have_these_defaults() -> None:
    found = {code(row[0])[0]: code(row[1])[0] for row in table(ROOT / "README.md", "key")}
    assert found
    assert found.items() <= defaults().items()


def test_the_yaml_example_loads(tmp_path: Path) -> None:
    (example,) = blocks(DOCS / "configuration.md", "yaml")
    file = tmp_path / "vcache.yaml"
    file.write_text(example)
    assert VCacheConfig.from_file(file, env={}).segment.size == ByteSize(2 << 30)


def test_every_counter_is_explained() -> None:
    found = {name for row in table(DOCS / "operations.md", "counter") for name in code(row[0])}
    assert found == set(COUNTERS)


def test_every_error_is_listed_with_its_kind() -> None:
    known = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    rows = {code(row[0])[0]: code(row[1]) for row in table(DOCS / "api.md", "error")}
    assert set(rows) == set(known)
    for name, kinds in rows.items():
        for kind in kinds:
            assert issubclass(known[name], getattr(builtins, kind)), (name, kind)


def test_every_command_that_is_written_down_exists() -> None:
    from typer.main import get_command

    from vcache.cli.app import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    text = "\n".join(page.read_text() for page in PAGES)
    mentioned = set(re.findall(r"(?:`|^)vcache ([a-z-]+)\b", text, re.MULTILINE))
    assert mentioned
    assert mentioned <= known, mentioned - known
    assert {code(row[0])[0].removeprefix("vcache ") for row in table(DOCS / "cli.md", "command")} == known


def test_every_make_target_that_is_written_down_exists() -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(page.read_text() for page in PAGES)
    mentioned = set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", text, re.MULTILINE))
    assert {first or second for first, second in mentioned} <= known


def test_test_paths_that_are_written_down_exist() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    for path in set(re.findall(r"tests/[\w/.]+\w", text)):
        assert (ROOT / path).exists(), path


def test_source_files_that_the_structure_names_exist() -> None:
    """A row may leave out the folders that it has named before: `cache/pool.py`, `tiers.py`."""
    known = [path.relative_to(ROOT).as_posix() for path in (*(ROOT / "src").rglob("*.py"), *ROOT.glob("scripts/*.py"))]
    named = {name for name in code((DOCS / "structure.md").read_text()) if name.endswith(".py") and "tests/" not in name}
    assert len(named) > 20
    assert {name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in known)} == set()


def test_source_that_is_quoted_is_the_source() -> None:
    """Blocks of `py` are taken from the source, those of `python` are examples."""
    source = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    quotes = [quote for page in PAGES for quote in blocks(page, "py")]
    assert quotes
    for quote in quotes:
        assert any(quote in text for text in source), quote


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "api.md", DOCS / "keys.md"], ids=lambda page: page.name)
def test_python_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("VCACHE_CONFIG", "VCACHE_MANAGER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    examples = blocks(page, "python")
    assert examples
    for example in examples:
        if "torch" in example:
            pytest.importorskip("torch")
        exec(compile(example, str(page), "exec"), {"__name__": "example"})
