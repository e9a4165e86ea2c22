"""`vcache story`: keys as they are printed, a page that fits a terminal, and keys of which nobody knows anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from manager.manager_helpers import ServerThread, keys, segment_of, serving, store
from rich.console import Console
from support.commands import invoke

from vcache.cli.story import age, parse_digest, render
from vcache.errors import ArgumentError
from vcache.keys import CacheKey
from vcache.manager.api import Place, StoryEntry

DIGEST = bytes(range(16))


@pytest.fixture
def server(folder: Path) -> Iterator[ServerThread]:
    with serving(f"unix://{folder}/manager.sock") as running:
        yield running


@pytest.mark.parametrize("text", [str(CacheKey(b"n" * 16, DIGEST)), DIGEST.hex(), DIGEST.hex().upper()])
def test_a_key_is_named_as_it_is_printed_or_by_its_digest(text: str) -> None:
    assert parse_digest(text) == DIGEST


@pytest.mark.parametrize("text", ["", "vc1-00-11", "x" * 32, DIGEST.hex()[:-1]])
def test_what_is_no_key_is_a_usage_error(text: str) -> None:
    with pytest.raises(ArgumentError, match="not a cache key"):
        parse_digest(text)
    result = invoke("story", text)
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1


def test_the_story_of_a_chunk(server: ServerThread) -> None:
    client = server.client(name="engine-0")
    client.mount(segment_of(client))
    store(client, keys(1, 2))
    client.lookup(keys(1, 2))
    key = keys(1, 2)[1]
    result = invoke("story", str(CacheKey(b"n" * 16, key)))
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80
    assert [
        word in result.output for word in ("engine-0", "granted", "published", "present", "DRAM: segment", "generation")
    ] == ([True] * 6)
    entries = json.loads(invoke("story", key.hex(), "--json").output)
    assert [entry["what"] for entry in entries] == ["granted", "written", "published", "looked up", "present"]
    assert entries[0]["place"] == entries[-1]["place"]
    assert entries[0]["place"]["tier"] == "dram"
    client.close()


def test_a_key_that_nobody_knows_is_one_line_and_exit_code_1(server: ServerThread) -> None:
    for options in ((), ("--json",)):
        result = invoke("story", DIGEST.hex(), *options)
        assert result.exit_code == 1
        assert result.output == f"error: {DIGEST.hex()}: the manager knows nothing of this chunk, or nothing any more\n"


def test_a_page_of_large_numbers_fits_80_columns() -> None:
    place = Place(None, 2**31, 65535, 65535, 2**62)
    entries = [
        StoryEntry(ago=5400.0, client="a client with a very long name indeed", what="granted", place=place, shard=65535),
        StoryEntry(ago=61.0, what="evicted", detail="its segment went, or was mounted again"),
        StoryEntry(what="absent"),
    ]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(entries))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert [word in text for word in ("1.5 h ago", "1.0 min ago", "now", str(2**62), "gone: segment 2147483648")] == [True] * 5


def test_ages_have_about_three_digits() -> None:
    assert [age(seconds) for seconds in (0.04, 59.9, 60.0, 3599.0, 7200.0)] == [
        "40 ms",
        "59.9 s",
        "1.0 min",
        "60.0 min",
        "2.0 h",
    ]
