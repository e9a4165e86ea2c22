"""`vcache bench serve` with real vLLM servers of a tiny model: the same load with and without sharing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import invoke
from tiny_models import write_model
from vllm_harness import require_vllm

require_vllm()
pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(600)]

LOAD = ("--conversations", "4", "--turns", "3", "--systems", "1", "--system-tokens", "512", "--turn-tokens", "128")
LOAD += ("--answer-tokens", "8", "--concurrency", "1", "--routing", "round-robin", "--spread", "0.1")
SERVERS = ("--instances", "2", "--kv-memory", "256MiB", "--host-memory", "128MiB", "--vcache-option", "cache.chunk_size=64")
SERVERS += ("--vcache-option", "lookup_deadline_ms=2000")
SERVE = ("--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "float32", "--enforce-eager", "--block-size", "32")


def test_the_second_instance_finds_what_the_first_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = write_model(tmp_path / "model")
    ways = ("--way", "none", "--way", "vcache")
    serve = [f"--serve-arg={argument}" for argument in SERVE]
    files = ("--json", str(tmp_path / "report.json"), "--logs", str(tmp_path / "logs"))
    result = invoke("bench", "serve", "--model", str(model), *LOAD, *SERVERS, *ways, *serve, *files)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    none, vcache = report["rows"]
    for row in (none, vcache):
        assert row["requests"] == 12
        assert row["queried_tokens"] >= row["prompt_tokens"] > 12 * 500
        assert row["output_tokens"] >= 12 * 7
        assert 0 < row["later_p50_ms"] <= row["later_p99_ms"]
        assert row["itl_mean_ms"] > 0
    # Without sharing, each turn goes to an instance that does not have the one before.
    assert none["connector_hit_tokens"] == 0
    assert none["loaded_gb"] is None
    assert vcache["connector_hit_tokens"] > 0
    assert vcache["hit_ratio"] > none["hit_ratio"]
    assert vcache["loaded_gb"] > 0
    assert vcache["stored_gb"] > 0
    assert vcache["loaded_dram_gb"] >= vcache["loaded_gb"], (
        "all of it comes from host memory; some may not be wanted in the end"
    )
    assert not vcache["loaded_vram_gb"]
    assert vcache["loads"] > 0
    for row in (none, vcache):
        assert row["request_prefill_time_seconds_count"] == row["requests"]
        assert row["server_ttft_mean_ms"] >= row["prefill_mean_ms"] > 0
        assert 0 < row["computed_tokens"] < row["queried_tokens"]
