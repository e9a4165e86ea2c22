"""`vcache bench trace`: what it reads, what it refuses, and that a replay is right and repeatable."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest
from support.commands import invoke

from vcache.bench.trace import Replay, capacity_of, policy_of, replay
from vcache.bench.trace_files import Trace, TraceRequest, read_trace
from vcache.errors import ArgumentError, VCacheError


def line(time: float, names: list[int], **more: Any) -> str:
    return json.dumps({"timestamp": time, "input_length": 512 * len(names), "output_length": 1, "hash_ids": names} | more)


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def chats(seed: int, requests: int) -> list[str]:
    """Conversations over shared beginnings, and prompts that nobody asks again."""
    chosen, lines, names, next_name = random.Random(seed), [], [[number] for number in range(4)], 4
    for number in range(requests):
        if chosen.random() < 0.5:
            prompt = list(range(next_name, next_name + 3))
        else:
            which = chosen.randrange(len(names))
            prompt = names[which] = [*names[which], next_name]
        next_name += 3
        lines.append(line(1000 * number, prompt))
    return lines


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz"])
def test_traces_are_read_as_they_are_or_compressed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"some_trace{suffix}"
    text = "\n".join([line(0, [1, 2]), "", line(1500, [1, 3])]).encode()
    path.write_bytes(lzma.compress(text) if suffix.endswith("xz") else text)
    trace = read_trace(path)
    assert (trace.name, trace.block_tokens, trace.blocks, trace.unique) == ("some_trace", 512, 4, 3)
    assert [request.time for request in trace.requests] == [0, 1.5]
    first, second = (request.keys for request in trace.requests)
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert len(read_trace(path, 1).requests) == 1


def test_a_block_of_bailian_is_named_by_what_comes_before_it(tmp_path: Path) -> None:
    lines = [
        json.dumps({"chat_id": 1, "parent_chat_id": -1, "timestamp": 1.5, "input_length": 20, "type": "text", "hash_ids": ids})
        for ids in ([7, 9], [8, 9])
    ]
    trace = read_trace(write(tmp_path / "b.jsonl", lines))
    assert (trace.block_tokens, trace.unique, trace.requests[0].time) == (16, 4, 1.5)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["{}"], "line 1: not a trace of Mooncake or Bailian"),
        (["\xff\xfe"], "line 1: not a trace"),
        ([line(0, [1]), line(0, [1])[:-5]], "line 2: not a trace"),
        ([line(5, [1]), line(4, [1])], "line 2: earlier than"),
        ([line(0, [1]).replace("512", "600")], "line 1: 1 hash_ids for 600 tokens in blocks of 512"),
        ([line(0, [1]), line(0, [1] * 32, chat_id=2).replace("16384", "512")], "line 2: lines of two formats"),
        ([""], "no requests in it"),
    ],
)
def test_what_is_no_trace_is_one_clear_line(tmp_path: Path, lines: list[str], complaint: str) -> None:
    path = write(tmp_path / "t.jsonl", lines)
    with pytest.raises(VCacheError, match=complaint) as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "t.jsonl.xz"
    broken.write_bytes(b"no xz at all")
    cut = tmp_path / "cut.jsonl.xz"
    cut.write_bytes(lzma.compress(line(0, [1]).encode() * 100)[:-20])
    for path in (tmp_path / "absent.jsonl", broken, cut):
        with pytest.raises(VCacheError, match=r"cannot be read|not a trace"):
            read_trace(path)


def trace_of(prompts: list[list[int]]) -> Trace:
    return Trace(
        "t", 512, [TraceRequest(float(at), 512, [bytes([n]) * 16 for n in prompt]) for at, prompt in enumerate(prompts)]
    )


def test_hits_are_leading_blocks_that_are_there() -> None:
    found = replay(trace_of([[1, 2, 3], [1, 2, 4], [9, 2], [1, 2, 3]]), policy_of("lru").config, 10)
    # 9 is not 1: what follows it is no hit, although the directory knows a block of that name.
    assert (found.asked, found.hits) == (11, 2 + 3)
    assert (found.evictions, found.not_stored) == (0, 1)


def test_a_full_pool_evicts_the_tail_of_the_coldest() -> None:
    found = replay(trace_of([[1, 2], [3], [1, 2], [4], [3]]), policy_of("lru").config, 3)
    assert (found.hits, found.evictions) == (2, 2)


def test_sessions_live_through_a_pause_of_the_trace() -> None:
    pool = Replay(policy_of("lru").config, 4)
    assert pool.request(0.0, [b"k" * 16]) == 0
    assert pool.request(10_000.0, [b"k" * 16]) == 1
    pool.directory.check_integrity()


def test_capacities_and_policies() -> None:
    trace = trace_of([[1, 2, 3, 4]])
    assert capacity_of("50%", trace, 1) == 2
    assert capacity_of("3KiB", trace, 2) == 3
    for text in ("many", "1%", "1B"):
        with pytest.raises(ArgumentError, match="--capacity"):
            capacity_of(text, trace, 2)
    assert policy_of("sieve+reuse").config.eviction == "sieve"
    for name in ("fifo", "lru+", "lru+some"):
        if name != "lru+":
            with pytest.raises(ArgumentError, match=f"--policy {name.replace('+', '.')}"):
                policy_of(name)


def test_the_command_compares_with_lru_and_gives_the_same_again(tmp_path: Path) -> None:
    file = write(tmp_path / "chats.jsonl", chats(1, 400))
    reports = []
    for number in range(2):
        out = tmp_path / f"{number}.json"
        arguments = ("--capacity", "10%", "--capacity", "512MiB", "--policy", "sieve", "--policy", "lru+reuse")
        result = invoke("bench", "trace", str(file), *arguments, "--json", str(out))
        assert result.exit_code == 0, result.output
        rows = json.loads(out.read_text())["rows"]
        for row in rows:
            del row["cpu_seconds"]
        reports.append(rows)
    rows = reports[0]
    assert rows == reports[1]
    assert [(row["capacity"], row["policy"]) for row in rows] == [
        (capacity, policy) for capacity in ("10%", "512MiB") for policy in ("lru", "sieve", "lru+reuse")
    ]
    assert [row["of_lru"] for row in rows if row["policy"] == "lru"] == [1, 1]
    assert all(
        0 < row["hit_ratio"] < 1 and row["of_lru"] == row["hit_ratio"] / rows[at // 3 * 3]["hit_ratio"]
        for at, row in enumerate(rows)
    )
    assert rows[3]["blocks"] == 8


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", [line(0, [1])])
    for arguments in ((str(tmp_path / "absent.jsonl"),), (str(file), "--capacity", "none"), (str(file), "--policy", "x")):
        result = invoke("bench", "trace", *arguments)
        assert result.exit_code != 0
        assert result.output.count("error:") == 1
