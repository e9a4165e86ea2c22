"""A vLLM server as the demo sees it: command, answers, counters, death. The server is a fake, over a real socket."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vcache.children.sessions import members
from vcache.demo import DemoError
from vcache.demo.hardware import Hardware, threads
from vcache.demo.vllm_server import Instance, arguments, environment, parse_counters

pytestmark = pytest.mark.processes
CPU = Hardware((), "bfloat16", 2)
GIB = 2**30
LONG = "word " * 600


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Instance]]:
    started: list[Instance] = []

    def launch(name: str = "a", **env: str) -> Instance:
        fake = {"PYTHONPATH": str(Path(__file__).parent), "FAKE_POOL": str(tmp_path / "pool")} | env
        options = arguments("model", tmp_path / f"{name}.sock", "unix:///m.sock", CPU, GIB)
        started.append(Instance(name, tmp_path, options, fake, module="fake_vllm"))
        return started[-1]

    yield launch
    for each in started:
        each.stop()


def test_a_hit_of_the_pool_and_one_of_its_own_are_told_apart(start: Callable[..., Instance]) -> None:
    a, b = start("a"), start("b")
    a.wait_ready()
    b.wait_ready()
    cold, salted, shared, own = a.ask(LONG + "?"), b.ask(LONG + "?", salt="s"), b.ask(LONG + "?"), b.ask(LONG + "?")
    assert [(run.own_tokens, run.hit_tokens, run.loaded_tokens) for run in (cold, salted, shared, own)] == [
        (0, 0, 0),
        (0, 0, 0),
        (0, 512, 512),
        (512, 0, 0),
    ]
    assert (shared.load_bytes, shared.load_seconds, shared.prompt_tokens) == (512_000, 0.25, 601)
    assert shared.text == "the answer to ? "
    assert shared.ids == [3, 6, 2, 1]
    assert shared.prompt_ids == [4] * 600 + [1]
    assert 0 < shared.first_token < 30
    assert a.count("one two three") == 3


def test_it_is_started_as_a_user_would(start: Callable[..., Instance], tmp_path: Path) -> None:
    a = start()
    a.wait_ready()
    argv = json.loads((tmp_path / "a.log").read_text().splitlines()[0])
    config = json.loads(argv[argv.index("--kv-transfer-config") + 1])
    assert config["kv_connector"] == "VCacheConnector"
    assert config["kv_role"] == "kv_both"
    assert config["kv_load_failure_policy"] == "recompute"
    assert config["kv_connector_extra_config"].items() >= {"address": "unix:///m.sock", "segment.lend": False}.items()


def test_kill_ends_the_processes_behind_it_too(start: Callable[..., Instance]) -> None:
    a = start()
    a.wait_ready()
    assert len(members(a.pid)) == 2
    a.kill()
    a.kill()
    assert members(a.pid) == []
    again = start()
    again.wait_ready()
    assert again.pid != a.pid


def test_a_server_that_dies_is_reported_with_its_error_and_its_log(start: Callable[..., Instance], tmp_path: Path) -> None:
    a = start()
    a.wait_ready()
    with pytest.raises(DemoError, match=rf"a \(pid \d+\): .*; ValueError: told to die \(log: {tmp_path}/a.log\)"):
        a.ask("die")
    with pytest.raises(DemoError, match="ended with code 7; ValueError: told to die"):
        a.wait_ready()


def test_a_request_that_is_refused_is_reported(start: Callable[..., Instance]) -> None:
    a = start()
    a.wait_ready()
    with pytest.raises(DemoError, match=r"/v1/chat/completions answered 400: .*too long"):
        a.ask("refuse")


def test_counters_are_summed_over_labels_and_0_when_missing() -> None:
    found = parse_counters(
        "# HELP vllm:prefix_cache_hits_total 7\n"
        'vllm:prefix_cache_hits_total{engine="0"} 3.0\nvllm:prefix_cache_hits_total{engine="1"} 4.0\n'
        "vllm:prefix_cache_hits_created 9.0\nvllm:vcache_load_bytes_total 1.29e+08\n"
    )
    assert (found["own"], found["load_bytes"], found["loads"]) == (7.0, 129e6, 0.0)


def test_instances_share_few_cores_and_get_a_gpu_each(tmp_path: Path) -> None:
    env = environment(tmp_path, CPU, 0, GIB)
    assert (env["OMP_NUM_THREADS"], env["VLLM_CPU_OMP_THREADS_BIND"], env["VLLM_CPU_KVCACHE_SPACE"]) == ("2", "nobind", "1")
    gpus = Hardware(("0", "3"), "auto", 0)
    assert [environment(tmp_path, gpus, number, GIB)["CUDA_VISIBLE_DEVICES"] for number in (0, 1)] == ["0", "3"]


def test_the_kv_cache_has_a_given_size_everywhere(tmp_path: Path) -> None:
    """On a GPU instead of a share of it, which would be measured while the other instance fills the same GPU."""
    gpu = arguments("m", tmp_path / "s", "unix:///m", Hardware(("0", "0"), "auto", 0), 4 * GIB)
    assert gpu[gpu.index("--kv-cache-memory-bytes") + 1] == str(4 * GIB)
    assert float(gpu[gpu.index("--gpu-memory-utilization") + 1]) < 0.5
    assert "--kv-cache-memory-bytes" not in arguments("m", tmp_path / "s", "unix:///m", CPU, 4 * GIB)
    assert environment(tmp_path, CPU, 0, 4 * GIB)["VLLM_CPU_KVCACHE_SPACE"] == "4"


@pytest.mark.parametrize(
    ("cpu_max", "cpus", "expected"),
    [("max 100000\n", 2, 2), ("200000 100000\n", 64, 2), ("50000 100000\n", 8, 1), ("max 100000\n", 64, 16), ("", 4, 4)],
)
def test_threads_fit_the_cpus_that_there_are(cpu_max: str, cpus: int, expected: int) -> None:
    assert threads(cpu_max, cpus) == expected
