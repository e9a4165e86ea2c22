"""Imports go downward only: the module table of docs/structure.md against the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from test_docs import DOCS, ROOT, code, table

SOURCE = ROOT / "src" / "vcache"
TOP = {path.stem for path in SOURCE.iterdir() if path.name != "__init__.py" and (path.is_dir() or path.suffix == ".py")}
TOP -= {"__pycache__", "py"}


def allowed() -> dict[str, set[str]]:
    """Module -> what it may import, as `name` or `package/module`; itself always."""
    rules: dict[str, set[str]] = {}
    for names, _, imports in table(DOCS / "structure.md", "module"):
        listed = set(code(imports))
        targets = TOP - listed if imports.startswith("everything") else listed
        for name in code(names):
            rules[name] = targets | set(code(names))
    return rules


def imports(file: Path) -> set[str]:
    """Modules of this package that a file imports, at any place in it, as `package/module` or `module`."""
    package = list(file.relative_to(SOURCE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            targets = [base + node.module.split(".")] if node.module else [[*base, alias.name] for alias in node.names]
            found |= {"/".join(target[:2]) for target in targets}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vcache":
            found.add("/".join((node.module or "").split(".")[1:3]))
        elif isinstance(node, ast.Import):
            found |= {"/".join(alias.name.split(".")[1:3]) for alias in node.names if alias.name.split(".")[0] == "vcache"}
    return found


def test_the_table_names_every_module() -> None:
    assert set(allowed()) == TOP


@pytest.mark.parametrize("module", sorted(TOP))
def test_imports_go_downward_only(module: str) -> None:
    path = SOURCE / module
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    may = allowed()[module]
    for file in files:
        for target in imports(file):
            if target and target.split("/")[0] in TOP:
                assert target in may or target.split("/")[0] in may, f"{file.relative_to(SOURCE)} imports {target}"
