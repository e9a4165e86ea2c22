"""Split a file for transport in pieces, and put it together again. Standard library only.

usage: split_file.py split FILE PREFIX [--piece MIB]     PREFIX.00, PREFIX.01, ... of at most MIB mebibytes, and PREFIX.json
       split_file.py join PREFIX FOLDER                  the file, under its own name, in FOLDER; its digest is checked
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

MIB = 2**20
_BLOCK = 4 * MIB


def split(file: Path, prefix: Path, piece: int) -> list[Path]:
    """Write pieces of at most `piece` bytes beside their description; returns all files written. Raises `ValueError` when
    `piece` is less than one, `OSError` when something cannot be read or written."""
    if piece < 1:
        raise ValueError("a piece must have at least one byte")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    digest, written = hashlib.sha256(), list[Path]()
    with file.open("rb") as source:
        while first := source.read(min(_BLOCK, piece)):
            path = prefix.with_name(f"{prefix.name}.{len(written):02d}")
            left = piece
            with path.open("wb") as target:
                block = first
                while block:
                    digest.update(block)
                    target.write(block)
                    left -= len(block)
                    block = source.read(min(_BLOCK, left)) if left else b""
            written.append(path)
    description = {
        "name": file.name,
        "nbytes": file.stat().st_size,
        "sha256": digest.hexdigest(),
        "pieces": [path.name for path in written],
    }
    listing = prefix.with_name(f"{prefix.name}.json")
    listing.write_text(json.dumps(description, indent=1))
    return [*written, listing]


def join(prefix: Path, folder: Path) -> Path:
    """Put the pieces beside `PREFIX.json` together in `folder`. Raises `ValueError` when a piece is missing or the content is
    not what was split; nothing is left behind then."""
    description = json.loads(prefix.with_name(f"{prefix.name}.json").read_text())
    pieces = [prefix.with_name(Path(name).name) for name in description["pieces"]]
    if missing := [path.name for path in pieces if not path.is_file()]:
        raise ValueError(f"missing: {', '.join(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / Path(description["name"]).name
    part = result.with_name(f"{result.name}.part")
    digest = hashlib.sha256()
    try:
        with part.open("wb") as target:
            for path in pieces:
                with path.open("rb") as source:
                    while block := source.read(_BLOCK):
                        digest.update(block)
                        target.write(block)
        if digest.hexdigest() != description["sha256"]:
            raise ValueError(f"{result.name}: the pieces do not make the file that was split")
        part.replace(result)
    finally:
        part.unlink(missing_ok=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("split")
    action.add_argument("file", type=Path)
    action.add_argument("prefix", type=Path)
    action.add_argument("--piece", type=int, default=56, help="MiB")
    action = actions.add_parser("join")
    action.add_argument("prefix", type=Path)
    action.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.action == "split":
            for path in split(arguments.file, arguments.prefix, arguments.piece * MIB):
                print(path)
        else:
            print(join(arguments.prefix, arguments.folder))
    except (OSError, ValueError, KeyError) as error:
        print(f"split_file: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
