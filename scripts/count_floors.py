"""Count how the source is built: rooms, floors, arrows, upward arrows and circles of imports; lines by room. Imports only.

usage: count_floors.py [FOLDER ...] [--json]    default: src/vcache; give two folders to see before and after

A **room** is a package or a module directly under the folder. An **arrow** goes from one room to another that it imports, at
any place in a file, for types only as well. The **floors** are the rooms on the longest way down along arrows. **Upward** are
the fewest arrows without which no rooms import each other in a circle. A **circle** is a set of files that import each other,
directly or not. Standard library only.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

Graph = Mapping[str, set[str]]


class Shape(NamedTuple):
    """What was counted in one folder."""

    rooms: int
    files: int
    lines: int
    floors: int
    arrows: int
    upward: list[str]
    circles: list[list[str]]
    way_down: list[str]
    """One of the longest: its length is the number of floors."""
    lines_by_room: dict[str, int]


def measure(folder: Path) -> Shape:
    """Read every module below `folder`, the root of a package."""
    files = {_name(folder, path): path for path in sorted(folder.rglob("*.py"))}
    imports = {name: set(_imports(folder, path, files)) - {name} for name, path in files.items()}
    rooms: dict[str, set[str]] = {room(name): set() for name in files}
    lines = dict.fromkeys(rooms, 0)
    for name, targets in imports.items():
        rooms[room(name)] |= {room(target) for target in targets} - {room(name)}
        lines[room(name)] += len(files[name].read_text().splitlines())
    upward = _upward(rooms)
    straight = {name: {target for target in targets if (name, target) not in upward} for name, targets in rooms.items()}
    way_down = _longest(straight)
    return Shape(
        rooms=len(rooms),
        files=len(files),
        lines=sum(lines.values()),
        floors=len(way_down),
        arrows=sum(map(len, rooms.values())),
        upward=[f"{source} -> {target}" for source, target in upward],
        circles=_circles(imports),
        way_down=way_down,
        lines_by_room=dict(sorted(lines.items())),
    )


def room(name: str) -> str:
    """The room of a module: `manager/server/listen` is in `manager`."""
    return name.split("/")[0]


def _name(folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return "/".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _imports(folder: Path, path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    """Modules of the same package that a file imports."""
    here = list(path.relative_to(folder).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
            found = [target[1:] for target in targets if target[0] == folder.name]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == folder.name):
            named = (node.module or "").split(".") if node.module else []
            base = [*here[: len(here) - node.level + 1], *named] if node.level else named[1:]
            found = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in found:
            # The longest part that is a module: the rest is a name in it.
            while target and "/".join(target) not in files:
                target = target[:-1]
            if target:
                yield "/".join(target)


def _upward(rooms: Graph) -> set[tuple[str, str]]:
    """The fewest arrows without which there is no circle of rooms; of equals, the first in the order of names."""
    arrows = [
        (source, target) for part in _circles(rooms) for source in part for target in sorted(rooms[source]) if target in part
    ]
    for count in range(len(arrows) + 1):
        for chosen in combinations(arrows, count):
            if not _circles({name: {to for to in targets if (name, to) not in chosen} for name, targets in rooms.items()}):
                return set(chosen)
    raise AssertionError("without any arrow there is no circle")


def _circles(graph: Graph) -> list[list[str]]:
    """Sets of names that reach each other, in order."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph.get(name, ())
        reach[start] = seen
    parts = {frozenset(other for other in reach[name] if name in reach.get(other, ())) for name in graph if name in reach[name]}
    return sorted(sorted(part) for part in parts)


def _longest(graph: Graph) -> list[str]:
    """The longest way along arrows of a graph without circles."""
    known: dict[str, list[str]] = {}

    def down(name: str) -> list[str]:
        if name not in known:
            known[name] = [name, *max((down(target) for target in sorted(graph[name])), key=len, default=[])]
        return known[name]

    return max((down(name) for name in sorted(graph)), key=len, default=[])


def main() -> int:
    """Print what was counted in each folder."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--json"]
    folders = [Path(argument) for argument in arguments] or [Path(__file__).resolve().parent.parent / "src" / "vcache"]
    for folder in folders:
        if not (folder / "__init__.py").is_file():
            print(f"{folder}: no package here", file=sys.stderr)
            return 2
    shapes = {str(folder): measure(folder.resolve()) for folder in folders}
    if "--json" in sys.argv:
        print(json.dumps({folder: shape._asdict() for folder, shape in shapes.items()}, indent=2))
        return 0
    for folder, shape in shapes.items():
        print(f"{folder}: {shape.rooms} rooms, {shape.files} files, {shape.lines:,} lines")
        print(f"  floors   {shape.floors}: {' > '.join(shape.way_down)}")
        print(f"  arrows   {shape.arrows}")
        print(f"  upward   {len(shape.upward)}{''.join(f'; {arrow}' for arrow in shape.upward)}")
        print(f"  circles  {len(shape.circles)}{''.join('; ' + ' <-> '.join(circle) for circle in shape.circles)}")
        print(f"  lines    {', '.join(f'{name} {lines:,}' for name, lines in shape.lines_by_room.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
