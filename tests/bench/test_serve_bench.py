"""`bench serve` against servers without a model: given by URL and started; what it counts, and how failures are told."""

from __future__ import annotations

import asyncio
import csv
import importlib.util
import json
import signal
import socketserver
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.cluster import eventually
from support.commands import Starter, invoke

from vcache.bench import serve, serve_ways
from vcache.bench.serve import Loads, Run, add_ratios, summary
from vcache.bench.serve_client import Endpoint, Sample, ServerError, complete
from vcache.bench.serve_counters import Counted, parse
from vcache.bench.serve_load import Request
from vcache.bench.serve_ways import Setup, connector, split
from vcache.config import VCacheConfig
from vcache.errors import ArgumentError

FAKE = Path(__file__).parent / "fake_server"
SMALL = ("--conversations", "4", "--turns", "3", "--systems", "2", "--system-tokens", "64", "--turn-tokens", "32")
SMALL += ("--answer-tokens", "6", "--concurrency", "2")
MEMORY = ("--kv-memory", "256MiB", "--host-memory", "64MiB", "--instances", "2")


def fake_module() -> ModuleType:
    path = FAKE / "vllm" / "entrypoints" / "openai" / "api_server.py"
    spec = importlib.util.spec_from_file_location("fake_api_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def serving(fault: str = "") -> Iterator[tuple[str, Any]]:
    """A server over TCP in this process: its URL, and what it counts."""
    module = fake_module()
    fake = module.Fake(fault=fault)
    handler = type("Handler", (module.Handler,), {"fake": fake})

    class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", fake
        server.shutdown()
        thread.join()


def bench(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "report.json"
    result = invoke("bench", "serve", *SMALL, *arguments, "--json", str(path))
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def cached_share(prompts: list[list[int]], block: int = 16) -> float:
    """What a cache without bound, empty at first, has of all prompts."""
    seen: set[tuple[int, ...]] = set()
    hits = 0
    for prompt in prompts:
        starts = [tuple(prompt[:end]) for end in range(block, len(prompt) + 1, block)]
        hits += block * sum(start in seen for start in starts)
        seen |= set(starts)
    return hits / sum(map(len, prompts))


# --- servers that run ----------------------------------------------------------------------------------------------------


def test_servers_that_run_are_measured_as_they_are(tmp_path: Path) -> None:
    with serving() as (one, first), serving() as (other, second):
        report = bench(tmp_path, "--url", one, "--url", f"{other}/v1", "--routing", "round-robin")
    (row,) = report["rows"]
    assert row["way"] == "as is"
    assert row["requests"] == 12
    # Four warm-up requests each; after that, six each.
    assert [len(first.prompts), len(second.prompts)] == [10, 10]
    asked = first.prompts[4:], second.prompts[4:]
    assert row["prompt_tokens"] == row["queried_tokens"] == sum(map(len, asked[0])) + sum(map(len, asked[1]))
    expected = sum(cached_share(each) * sum(map(len, each)) for each in asked) / row["prompt_tokens"]
    assert row["hit_ratio"] == row["own_hit_ratio"] == pytest.approx(expected)
    assert 0 < row["hit_ratio"] < 1
    assert row["loaded_gb"] is None, "what is not counted is not told"
    for turns in ("first", "later"):
        assert 0 < row[f"{turns}_p50_ms"] <= row[f"{turns}_p90_ms"] <= row[f"{turns}_p99_ms"]
    assert row["itl_p99_ms"] > 0
    assert row["requests_per_second"] == pytest.approx(12 / row["wall_s"])
    assert any("the-model at http://127.0.0.1:" in note for note in report["notes"])


def test_the_answers_are_part_of_the_next_prompt(tmp_path: Path) -> None:
    with serving() as (url, fake):
        bench(tmp_path, "--url", url, "--spread", "0", "--concurrency", "1")
    first, second = fake.prompts[4:6]
    assert second[: len(first) + 6] == [*first, 300, 301, 302, 303, 304, 305]


@pytest.mark.parametrize(("fault", "missing"), [("no metrics", "hit_ratio"), ("no ids", "")])
def test_other_servers_tell_less(tmp_path: Path, fault: str, missing: str) -> None:
    with serving(fault) as (url, _):
        (row,) = bench(tmp_path, "--url", url)["rows"]
    assert row["output_tokens_per_second"] > 0
    assert [name for name in ("hit_ratio",) if row[name] is None] == ([missing] if missing else [])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("refuse", '/v1/completions answered 400: {"error": "the prompt is\\n too long"}'),
        ("cut", "closed the connection amid an answer"),
    ],
)
def test_a_request_that_fails_ends_the_run_in_one_line(tmp_path: Path, fault: str, words: str) -> None:
    with serving(fault) as (url, _):
        result = invoke("bench", "serve", *SMALL, "--url", url)
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {url}")
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--url", "http://127.0.0.1:1"), 1, "http://127.0.0.1:1: ConnectionRefusedError"),
        (("--url", "localhost:8000"), 2, "is no URL of a server"),
        (("--url", "http://127.0.0.1:1", "--way", "none"), 2, "leave --way out"),
        ((), 2, "--model names what the servers shall serve"),
        (("--model", "m", "--way", "magic"), 2, "--way magic: must be one of none, native, lmcache, vcache"),
        (("--model", "m", "--vcache-option", "x"), 2, "an option is KEY=VALUE"),
        (("--model", "m", "--pool-memory", "16GiB"), 2, "leaves nothing"),
        (("--url", "http://127.0.0.1:1", "--loads", "2", "--discard", "2"), 2, "at least one must count"),
    ],
)
def test_what_cannot_be_is_said(arguments: tuple[str, ...], code: int, words: str) -> None:
    result = invoke("bench", "serve", *arguments)
    assert (result.exit_code, words in result.stderr) == (code, True), result.output


# --- servers that are started --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For temporary files of the command. Not `tmp_path`: the path of a unix socket must stay short."""
    with tempfile.TemporaryDirectory(prefix="vc-") as made:
        monkeypatch.setenv("TMPDIR", made)
        monkeypatch.setattr(tempfile, "tempdir", None)  # else the one that was found before counts
        yield Path(made)


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `vllm` is the fake one, here and in children."""
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)


def processes_of(text: str) -> list[str]:
    """Command lines of processes that mention `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
        except OSError:  # it ended while we looked
            continue
        if text in command:
            found.append(command)
    return found


@pytest.mark.processes
@pytest.mark.usefixtures("fake_vllm")
def test_ways_are_compared_in_one_run(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_ways, "find_spec", lambda name: None if name == "lmcache" else name)
    logs = tmp_path / "logs"
    report = bench(tmp_path, *MEMORY, "--model", "m", "--logs", str(logs))
    none, native, vcache = report["rows"]
    assert [none["way"], native["way"], vcache["way"]] == ["none", "native", "vcache"]
    assert none["prompt_tokens"] == native["prompt_tokens"] == vcache["prompt_tokens"]
    assert none["hit_ratio"] < vcache["hit_ratio"], "the fake shares between instances"
    assert none["loaded_gb"] is None
    assert vcache["loaded_gb"] == pytest.approx(vcache["connector_hit_tokens"] * 1000 / 1e9)
    assert native["loaded_gb"] is not None
    assert (none["later_mean_ratio"], none["throughput_ratio"]) == (1.0, 1.0)
    assert vcache["throughput_ratio"] == pytest.approx(vcache["requests_per_second"] / none["requests_per_second"])
    (ratios,) = [note for note in report["notes"] if note.startswith("vcache against none: ")]
    assert ratios.endswith(f"req/s x {vcache['throughput_ratio']:.2f}")
    assert "lmcache: not installed here (pip install lmcache)" in report["notes"]
    (memory,) = [note for note in report["notes"] if note.startswith("KV memory")]
    assert "native: 128 MiB in each instance, 32 MiB of host memory each" in memory
    assert "vcache: 128 MiB in each instance, 64 MiB of host memory shared" in memory
    expected = {f"{way}-1-instance-{number}.log" for way in ("none", "native", "vcache") for number in range(2)}
    expected |= {"vcache-1-manager.log", "vcache-1-lender-of-host-memory.log"}
    assert {log.name for log in logs.iterdir()} == expected
    assert not processes_of(str(folder))
    assert not list(folder.iterdir())


@pytest.mark.processes
@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("start", "native: instance 0 did not start: ValueError: this model is not for me"),
        ("die 6", "ended with code 7: ValueError: told to die"),
        ("refuse", "answered 400"),
    ],
)
def test_a_way_that_fails_is_a_line_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    monkeypatch.setenv("FAKE_FAULT", f"OffloadingConnector:{fault}")
    report = bench(tmp_path, *MEMORY, "--model", "m", "--way", "none", "--way", "native")
    assert [row["way"] for row in report["rows"]] == ["none"]
    (note,) = [note for note in report["notes"] if note.startswith("native: ") and "in each instance" not in note]
    assert words in note


@pytest.mark.processes
@pytest.mark.usefixtures("fake_vllm")
def test_repeats_are_told_one_by_one_and_files_hold_them(tmp_path: Path) -> None:
    report = bench(tmp_path, *MEMORY, "--model", "m", "--way", "none", "--repeats", "2", "--csv", str(tmp_path / "rows.csv"))
    (row,) = report["rows"]
    assert len(row["runs"]) == row["runs_done"] == 2
    assert row["wall_s"] == pytest.approx(sum(run["wall_s"] for run in row["runs"]) / 2)
    with open(tmp_path / "rows.csv", newline="") as file:
        (filed,) = csv.DictReader(file)
    assert float(filed["throughput_ratio"]) == 1.0
    assert float(filed["own_hit_ratio"]) == row["own_hit_ratio"]


@pytest.mark.processes
@pytest.mark.usefixtures("fake_vllm")
def test_several_loads_on_the_same_servers(tmp_path: Path, folder: Path) -> None:
    """Each has prompts of its own; the first fills the caches and does not count."""
    logs = tmp_path / "logs"
    report = bench(
        tmp_path, *MEMORY, "--model", "m", "--way", "none", "--loads", "3", "--discard", "1", "--logs", str(logs), "--explain"
    )
    (row,) = report["rows"]
    assert row["runs_done"] == 2
    assert [run["discarded"] for run in row["runs"]] == [True, False, False]
    assert len({run["prompt_tokens"] for run in row["runs"]}) == 3, "lengths follow from the seed"
    assert row["prompt_tokens"] == sum(run["prompt_tokens"] for run in row["runs"][1:]) / 2
    for run in row["runs"]:
        assert run["queried_tokens"] == run["prompt_tokens"], "no warm-up between them, and nothing of another load"
    assert {log.name for log in logs.iterdir()} == {"none-1-instance-0.log", "none-1-instance-1.log"}, "servers start once"
    again = bench(tmp_path, *MEMORY, "--model", "m", "--way", "none", "--seed", "1")["rows"][0]
    assert again["prompt_tokens"] == row["runs"][1]["prompt_tokens"], "a load has the seed that its place tells"


def test_the_loads_of_servers_that_run(tmp_path: Path) -> None:
    with serving() as (url, fake):
        (row,) = bench(tmp_path, "--url", url, "--loads", "2", "--discard", "1")["rows"]
    assert [len(row["runs"]), row["runs_done"], row["requests"], len(fake.prompts)] == [2, 1, 12, 4 + 24]


@pytest.mark.processes
@pytest.mark.usefixtures("fake_vllm")
def test_what_the_times_are_made_of_and_where_tokens_came_from(tmp_path: Path) -> None:
    report = bench(tmp_path, *MEMORY, "--model", "m", "--way", "native", "--way", "vcache", "--explain")
    native, vcache = report["rows"]
    for row in (native, vcache):
        assert row["queue_mean_ms"] == pytest.approx(10)
        assert row["prefill_mean_ms"] == pytest.approx(20)
        assert row["request_queue_time_seconds_count"] == row["requests"], "the warm-up does not count"
        sources = row["own_hit_tokens"] + row["connector_hit_tokens"] + row["computed_tokens"]
        assert sources == row["queried_tokens"]
    assert vcache["loaded_vram_gb"] == pytest.approx(vcache["loaded_gb"] / 4)
    assert vcache["loaded_dram_tokens"] == pytest.approx(vcache["connector_hit_tokens"] * 3 / 4)
    assert vcache["loaded_storage_gb"] is None, "what is not counted is not told"
    assert native["loaded_dram_gb"] == native["loaded_gb"], "it has no other tier"
    assert native["loaded_vram_gb"] is None
    assert vcache["load_mean_ms"] == pytest.approx(4)
    (line,) = [note for note in report["notes"] if note.startswith("vcache, means: ")]
    assert "queue 10, prefill 20, " in line
    assert f"{vcache['loads']:,.0f} loads of 4.0 ms" in line
    assert any(note.startswith("native, prompt tokens: own cache ") for note in report["notes"])


def test_only_who_asks_gets_the_times(tmp_path: Path) -> None:
    with serving() as (url, _):
        report = bench(tmp_path, "--url", url)
    assert report["rows"][0]["queue_mean_ms"] == pytest.approx(10), "the file always has them"
    assert not any(", means: " in note for note in report["notes"])


@pytest.mark.usefixtures("fake_vllm")
def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with serving() as (url, _):
        bench(tmp_path, "--url", url, "--plot", str(tmp_path / "plot.svg"))
    assert "later turns" in (tmp_path / "plot.svg").read_text()


@pytest.mark.processes
@pytest.mark.usefixtures("fake_vllm")
def test_when_every_way_fails_the_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULT", "none:start")
    result = invoke("bench", "serve", *SMALL, *MEMORY, "--model", "m", "--way", "none")
    assert result.exit_code == 1
    assert "error: none: instance 0 did not start: ValueError: this model is not for me" in result.stderr


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_it_is_ended(folder: Path, number: signal.Signals) -> None:
    """Servers, what they started, manager and lender."""
    starter = Starter(folder)
    env = {"PYTHONPATH": str(FAKE), "TMPDIR": str(folder)}
    started = starter("bench", "serve", *MEMORY, "--model", "m", "--way", "vcache", "--conversations", "100000", env=env)
    try:
        eventually(lambda: len(processes_of(f"sys.stdin.read()  # {folder}")) == 2, what="both servers")
        code = started.end(number)
        assert code == (-signal.SIGKILL if number is signal.SIGKILL else 130), started.err
        eventually(lambda: not processes_of(str(folder)), what="the end of the servers")
        assert number is signal.SIGKILL or not list(folder.glob("vcache-bench-*")), "nor a folder"
    finally:
        starter.kill_all()


# --- what it is made of --------------------------------------------------------------------------------------------------


def setup(**changes: Any) -> Setup:
    made = Setup("m", 4, kv_memory=64 << 30, host_memory=48 << 30, pool_memory=32 << 30, max_model_len=9, devices=("0", "1"))
    return made._replace(**changes)


@pytest.mark.parametrize("devices", [(), ("0",), ("3", "5")])
def test_all_ways_get_the_same_memory(devices: tuple[str, ...]) -> None:
    made = setup(devices=devices)
    for way in serve_ways.WAYS:
        shares = split(way, made)
        rings = 4 * serve_ways.staging(made) if way == "vcache" else 0
        assert 4 * shares.engine + max(1, len(devices)) * shares.shared_vram + rings == made.kv_memory
        assert 4 * shares.engine_host + shares.shared_host == (0 if way == "none" else made.host_memory)
    with pytest.raises(ArgumentError, match="leaves nothing"):
        setup(pool_memory=64 << 30).check()


def test_the_vram_of_its_rings_is_taken_from_vcache() -> None:
    assert serve_ways.staging(setup(devices=())) == 0
    assert serve_ways.staging(setup(host_memory=0)) == 0
    assert serve_ways.staging(setup()) == VCacheConfig().transfer.staging > 0
    smaller = setup(vcache_options={"transfer.staging": "64MiB"})
    assert split("vcache", smaller).engine == (64 - 32) * 2**30 // 4 - 64 * 2**20


def test_command_lines() -> None:
    made = setup(serve_args=("--enforce-eager",), vcache_options={"load_threads": 16})
    transfer = connector("vcache", made, address="unix:///a")
    options = serve_ways.arguments(made, "/s", 5, transfer)
    assert options[-1] == "--enforce-eager"
    given = json.loads(options[options.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert (given["address"], given["load_threads"], given["segment.lend"]) == ("unix:///a", 16, False)
    assert options[options.index("--kv-cache-memory-bytes") + 1] == "5"
    assert "--kv-transfer-config" not in serve_ways.arguments(made, "/s", 5, connector("none", made))
    native = connector("native", made)
    assert native is not None
    assert native["kv_connector_extra_config"] == {"cpu_bytes_to_use": 12 << 30}
    assert [serve_ways.environment(made, number)["CUDA_VISIBLE_DEVICES"] for number in range(4)] == ["0", "1", "0", "1"]
    assert serve_ways.option("a=true") == ("a", True)
    assert serve_ways.option("a=4GiB") == ("a", "4GiB")
    command = serve_ways.lmcache_server(made, 1, 2)
    assert command[command.index("--l1-size-gb") + 1] == "48"


METRICS = """\
# HELP vllm:prefix_cache_queries_total Prefix cache queries.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 600.0
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 400.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e+09
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 250.0
vllm:external_prefix_cache_queries_total{engine="0",model_name="m"} 350.0
vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 150.0
"""


@pytest.mark.parametrize(
    ("more", "loaded", "stored"),
    [
        ("", None, None),
        ("vllm:vcache_load_bytes_total 7.0\nvllm:vcache_save_bytes_total 9.0\n", 7.0, 9.0),
        ('vllm:kv_offload_total_bytes_total{transfer_type="CPU_to_GPU"} 5.0\n', 5.0, None),
        (
            'vllm:kv_offload_total_bytes_total{transfer_type="GPU_to_CPU"} 5.0\nvllm:kv_offload_store_bytes_total 6.0\n',
            None,
            6.0,
        ),
    ],
)
def test_counters_are_read(more: str, loaded: float | None, stored: float | None) -> None:
    counted = parse(METRICS + more)
    assert counted[:5] == (1000.0, 250.0, 150.0, loaded, stored)
    assert counted.hit_ratio == 0.4
    assert counted.since(Counted(500.0, 150.0, 50.0, None, None)).hit_ratio == 0.4
    assert parse("") == Counted(None, None, None, None, None)
    assert parse("").hit_ratio is None


def test_numbers_of_a_run() -> None:
    firsts = [0.100, 0.200, 0.300, 0.400]
    samples = [Sample(0, 10, [], 3, first, [0.010, 0.030]) for first in firsts]
    samples += [Sample(1, 20, [], 5, first / 2, [0.040]) for first in firsts]
    row = summary("vcache", [Run(samples, 2.0, Counted(120.0, 30.0, 30.0, 2e9, None))])
    assert (row["first_mean_ms"], row["first_p50_ms"], row["first_p90_ms"]) == pytest.approx((250, 200, 400))
    assert (row["later_mean_ms"], row["later_p50_ms"], row["later_p99_ms"]) == pytest.approx((125, 100, 200))
    assert row["itl_mean_ms"] == pytest.approx(1e3 * (4 * 0.04 + 4 * 0.04) / (4 * 2 + 4 * 4))
    assert (row["requests_per_second"], row["output_tokens_per_second"]) == (4.0, 16.0)
    assert (row["hit_ratio"], row["own_hit_ratio"], row["loaded_gb"], row["stored_gb"]) == (0.5, 0.25, 2.0, None)
    slower = summary("none", [Run(samples, 4.0, None)])
    rows = [row, slower]
    add_ratios(rows)
    assert (row["throughput_ratio"], row["later_mean_ratio"]) == (2.0, 1.0)
    assert slower["hit_ratio"] is None


def test_medians_of_several_runs() -> None:
    runs = [Run([Sample(0, 10, [], 1, first, [])], 1.0, None) for first in (0.3, 0.1, 0.2)]
    row = summary("none", runs)
    assert row["first_p50_ms"] == pytest.approx(200)
    assert [run["first_p50_ms"] for run in row["runs"]] == pytest.approx([300, 100, 200])
    assert row["later_mean_ms"] is None
    assert row["itl_mean_ms"] is None


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:80/", Endpoint("http://h:80/", "h", 80)),
        ("http://h", Endpoint("http://h", "h", 80)),
        ("https://h/v1", Endpoint("https://h/v1", "h", 443, True)),
        ("http://h:1/a/v1/", Endpoint("http://h:1/a/v1/", "h", 1, prefix="/a")),
        ("unix:///tmp/s", Endpoint("unix:///tmp/s", socket="/tmp/s")),
    ],
)
def test_urls(url: str, expected: Endpoint) -> None:
    assert Endpoint.parse(url) == expected


@pytest.mark.parametrize("url", ["h:8000", "ftp://h", "http://", "http://h:99999", "unix://"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ArgumentError, match="is no URL"):
        Endpoint.parse(url)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"", "closed the connection without an answer"),
        (b"hello\r\n", "no HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nda", "IncompleteReadError"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {\n\n", "sends no JSON"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: [DONE]\n\n", "answered with no token"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": "out of memory"}\n\n', "out of memory"),
        (None, "said nothing for 0 s"),
    ],
)
def test_what_a_server_may_say_wrong(said: bytes | None, words: str) -> None:
    async def ask() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            if said is None:
                await reader.read()  # until the client has given up
            else:
                writer.write(said)
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            endpoint = Endpoint.parse(f"http://127.0.0.1:{port}")
            await complete(endpoint, "m", Request(0, 0, [1], 1, 0), silence=0.2)

    with pytest.raises(ServerError, match=words):
        asyncio.run(ask())


def test_lmcache_is_said_to_have_what_it_gets() -> None:
    """Its server takes whole GiB: it got one, and was said to have 1.9."""
    odd = setup(host_memory=2**30 * 19 // 10)
    assert split("lmcache", odd).shared_host == 2**30
    arguments = serve_ways.lmcache_server(odd, 1, 2)
    assert arguments[arguments.index("--l1-size-gb") + 1] == "1"


def test_a_load_that_fails_costs_the_same_in_every_way() -> None:
    """Only VCache's servers computed what could not be loaded; the others' failed the request, and with it the whole way."""
    policies = {way: (connector(way, setup()) or {}).get("kv_load_failure_policy") for way in ("native", "lmcache", "vcache")}
    assert policies == dict.fromkeys(policies, "recompute")


NONE = Loads(lambda number: None)  # type: ignore[arg-type,return-value]


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No servers, and a load that takes no time: which way had its turn when."""
    had: list[str] = []

    @contextmanager
    def started(way: str, *arguments: Any) -> Iterator[list[str]]:
        yield [way]

    def run(endpoints: list[str], *arguments: Any) -> Run:
        had.append(endpoints[0])
        if len(had) == 3 and endpoints[0] == "vcache":
            raise KeyboardInterrupt
        return Run([], 1.0, None)

    monkeypatch.setattr(serve, "started", started)
    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setattr(serve, "require_vllm", lambda: None)
    monkeypatch.setattr(serve, "unavailable", lambda way, setup: "")
    monkeypatch.setattr(serve, "_numbers", lambda found: dict.fromkeys(column.key for column in serve.COLUMNS[1:]))
    return had


def test_ways_take_turns_in_both_orders(turns: list[str]) -> None:
    """`none` always came first and `vcache` last: what drifts in the course of a run was repeated with every repeat."""
    serve.bench_ways(["none", "native"], setup(), NONE, print, command="", title="", repeats=3)
    assert turns == ["none", "native", "native", "none", "none", "native"]


def test_what_is_measured_is_told_after_every_load(turns: list[str]) -> None:
    """A command that is killed has written what there was."""
    told: list[int] = []
    loads = NONE._replace(total=3, discard=1)
    serve.bench_ways(
        ["none"],
        setup(),
        loads,
        print,
        command="",
        title="",
        repeats=2,
        on_load=lambda report: told.append(report.rows[0]["runs_done"]),
    )
    assert turns == ["none"] * 6
    assert told == [1, 2, 3, 4]


def test_an_interrupted_run_tells_what_it_has(turns: list[str]) -> None:
    """All that had been measured in hours was lost at Ctrl-C."""
    told: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        serve.bench_ways(["none", "native", "vcache"], setup(), NONE, print, command="", title="", on_interrupt=told.append)
    (report,) = told
    assert [row["way"] for row in report.rows] == ["none", "native"]
    assert any("interrupted" in note for note in report.notes)
