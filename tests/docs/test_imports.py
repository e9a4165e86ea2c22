"""Imports go downward only: the module table of docs/structure.md against the source."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

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


@pytest.fixture(scope="module")
def count_floors() -> Iterator[ModuleType]:
    """`scripts/count_floors.py` as a module."""
    spec = importlib.util.spec_from_file_location("count_floors", ROOT / "scripts" / "count_floors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["count_floors"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["count_floors"]


def test_the_house_has_few_floors_and_no_way_up(count_floors: ModuleType) -> None:
    shape = count_floors.measure(SOURCE)
    assert shape.floors <= 11, " > ".join(shape.way_down)
    assert shape.upward == []
    assert shape.circles == []


def test_what_is_counted(count_floors: ModuleType, tmp_path: Path) -> None:
    """Ways up and circles are found also where an import is inside a function or for types only."""
    package = tmp_path / "house"
    for name, text in {
        "__init__": "",
        "roof": "from .hall.stairs import climb\nfrom . import cellar\n",
        "hall/__init__": "",
        "hall/stairs": "from ..cellar import Coal\nif Coal.TYPE:\n    from .rail import Rail\n",
        "hall/rail": "from house.hall import stairs\n",
        "cellar": "def up():\n    from .hall import rail\n",
    }.items():
        path = package / f"{name}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    shape = count_floors.measure(package)
    assert (shape.rooms, shape.arrows, shape.floors) == (4, 4, 3)
    assert shape.upward == ["cellar -> hall"]
    assert shape.circles == [["cellar", "hall/rail", "hall/stairs"]]
    printed = subprocess.run(
        [sys.executable, ROOT / "scripts" / "count_floors.py", package, "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(printed.stdout)[str(package)]["arrows"] == 4
