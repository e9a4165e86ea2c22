"""Options of the connector, names of chunks, and the start of a manager. Needs no vLLM."""

from __future__ import annotations

import os
import signal
import socket
import threading
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.cluster import eventually
from vllm_facts import GROUP, facts
from vllm_harness import managers

from vcache.config import ByteSize, SegmentConfig
from vcache.errors import ConfigError
from vcache.integrations.vllm.autostart import ensure_manager
from vcache.integrations.vllm.keys import ChunkNames, chunk_tokens, namespace, worker_spec
from vcache.integrations.vllm.lend_size import fit, in_slabs
from vcache.integrations.vllm.settings import read_settings


class TestSettings:
    def test_nothing_given_means_the_users_socket_and_a_manager_started_there(self) -> None:
        settings = read_settings({}, {})
        assert settings.config.manager.address.startswith("unix:///")
        assert settings.config.manager.address.endswith("/manager.sock")
        assert settings.autostart
        assert not settings.sized

    @pytest.mark.parametrize(
        ("extra", "env"),
        [
            ({"address": "unix:///a"}, {}),
            ({"manager.address": "unix:///a"}, {}),
            ({"manager": {"address": "unix:///a"}}, {}),
            ({}, {"VCACHE_MANAGER_ADDRESS": "unix:///a"}),
            ({"address": "unix:///a"}, {"VCACHE_MANAGER_ADDRESS": "unix:///b"}),
        ],
    )
    def test_an_address_is_taken_and_nothing_is_started(self, extra: dict[str, Any], env: dict[str, str]) -> None:
        settings = read_settings(extra, env)
        assert settings.config.manager.address == "unix:///a"
        assert not settings.autostart

    def test_sections_options_and_file(self, tmp_path: Path) -> None:
        file = tmp_path / "vcache.yaml"
        file.write_text("segment: {size: 1GiB}\ncache: {chunk_size: 128}\n")
        extra = {"config": str(file), "cache.chunk_size": 64, "save_decoded": True, "sync_load_budget": "1MiB"}
        settings = read_settings(extra, {})
        assert settings.config.segment.size == 2**30
        assert settings.sized
        assert settings.config.cache.chunk_size == 64
        assert settings.options.save_decoded
        assert settings.options.sync_load_budget == 2**20

    @pytest.mark.parametrize(
        ("extra", "names"),
        [
            ({"chunk_size": 64}, "chunk_size"),
            ({"cache.chunksize": 64}, "cache.chunksize"),
            ({"segment": 5}, "segment"),
            ({"lookup_deadline_ms": 0}, "lookup_deadline_ms"),
            ({"load_threads": 0}, "load_threads"),
            ({"autostart": "perhaps"}, "autostart"),
            ({"vram_reserve": "much"}, "vram_reserve"),
        ],
    )
    def test_mistakes_are_errors_that_name_the_key(self, extra: dict[str, Any], names: str) -> None:
        with pytest.raises(ConfigError, match=names):
            read_settings(extra, {})


class TestNames:
    def test_chunk_size_is_rounded_up_to_whole_blocks(self) -> None:
        assert [chunk_tokens(256, block) for block in (16, 48, 256, 400)] == [256, 288, 256, 400]

    def test_a_digest_depends_on_namespace_and_last_block_hash_only(self) -> None:
        hashes = [sha256(bytes([i])).digest() for i in range(8)]
        one, other = ChunkNames(bytes(16), 64, 16, 16), ChunkNames(bytes(15) + b"x", 64, 16, 16)
        assert one.digest(hashes, 64) == one.digest([b""] * 3 + hashes[3:], 64)
        assert one.digest(hashes, 64) != one.digest(hashes, 128)
        assert one.digest(hashes, 64) != other.digest(hashes, 64)
        assert (one.whole(hashes, 127), one.whole(hashes, 128), one.whole(hashes[:5], 128)) == (1, 2, 1)
        assert one.tail(hashes, 127) == 112
        assert ChunkNames(bytes(16), 64, 32, 16).tail(hashes, 127) == 96, "in whole blocks"

    def test_the_same_set_up_has_the_same_namespace_everywhere(self) -> None:
        """When this value changes, all chunks stored before are misses: change it only on purpose."""
        assert namespace(facts(), GROUP, 256, "w").hex() == "d406a5eb8c650c785a3847098f899a4c"
        assert namespace(facts(model_config__seed=7), GROUP, 256, "w") == namespace(facts(), GROUP, 256, "w")

    @pytest.mark.parametrize(
        "change",
        [
            {"model_config__model": "n"},
            {"model_config__revision": "abc"},
            {"model_config__quantization": "fp8"},
            {"model_config__hf_config": {"rope_theta": 1e5}},
            {"model_config__layers": 31},
            {"parallel_config__tensor_parallel_size": 2},
            {"parallel_config__pipeline_parallel_size": 2},
            {"cache_config__cache_dtype": "fp8"},
            {"cache_config__prefix_caching_hash_algo": "sha256_cbor"},
            {"load_config__load_format": "dummy"},
            {"speculative_config": SimpleNamespace(method="eagle", num_speculative_tokens=3)},
        ],
    )
    def test_whatever_decides_the_bytes_changes_the_namespace(self, change: dict[str, Any]) -> None:
        assert namespace(facts(**change), GROUP, 256, "w") != namespace(facts(), GROUP, 256, "w")

    @pytest.mark.parametrize("change", [{"hash_block_size": 8}, {"dtype": "float16"}, {"num_kv_heads": 4}, {"head_size": 64}])
    def test_so_does_the_group(self, change: dict[str, Any]) -> None:
        assert namespace(facts(), GROUP._replace(**change), 256, "w") != namespace(facts(), GROUP, 256, "w")
        assert namespace(facts(), GROUP, 128, "w") != namespace(facts(), GROUP, 256, "w")
        assert namespace(facts(), GROUP, 256, "v") != namespace(facts(), GROUP, 256, "w")

    def test_block_size_and_layer_names_do_not(self) -> None:
        other = GROUP._replace(block_size=64, layer_names=("another",))
        assert namespace(facts(), other, 256, "w") == namespace(facts(), GROUP, 256, "w")

    def test_mla_has_one_shard_for_all_tensor_parallel_ranks(self) -> None:
        group = GROUP._replace(mla=True, num_kv_heads=1)
        config = facts(parallel_config__tensor_parallel_size=4, parallel_config__pipeline_parallel_size=2)
        assert worker_spec(config, group, 16, 1).world_size == 2
        assert worker_spec(config, GROUP, 16, 7).world_size == 8


class TestLending:
    def test_what_fits_is_lent_whole(self) -> None:
        segment = SegmentConfig(size=ByteSize(100))
        assert fit(segment, 100, 10, "gpu") is segment

    def test_a_cut_is_in_whole_chunks_and_said(self, caplog: pytest.LogCaptureFixture) -> None:
        cut = fit(SegmentConfig(size=ByteSize(2**30)), 100 * 2**20, 32 * 2**20, "cuda:0")
        assert cut.lend
        assert cut.size == 96 * 2**20
        assert "--gpu-memory-utilization" in caplog.text

    @pytest.mark.parametrize(
        ("size", "slot", "slab"),
        [
            (4 * 2**30, 32 * 2**20, 256 * 2**20),  # large enough for many of the usual size
            (256 * 2**20, 3 * 2**20, 30 * 2**20),
            (256 * 2**20, 32 * 2**20, 32 * 2**20),
            (64 * 2**20, 40 * 2**20, 40 * 2**20),
        ],
    )
    def test_several_slabs_so_that_slots_of_another_size_find_one(self, size: int, slot: int, slab: int) -> None:
        assert in_slabs(SegmentConfig(size=ByteSize(size)), slot).slab_size == slab

    def test_no_room_for_a_chunk_means_nothing_is_lent(self, caplog: pytest.LogCaptureFixture) -> None:
        for room in (31 * 2**20, 0, -5):
            assert not fit(SegmentConfig(size=ByteSize(2**30)), room, 32 * 2**20, "cuda:0").lend
        assert "lending nothing" in caplog.text


@pytest.mark.processes
def test_many_callers_start_one_manager(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    address = f"unix://{folder}/m.sock"
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(ensure_manager(address, 60))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    found = managers(address)
    try:
        assert answers == [True] * 4
        assert len(found) == 1
        assert ensure_manager(address, 1)
    finally:
        for process in found:
            os.kill(process, signal.SIGKILL)
    eventually(lambda: not ensure_exists(found), what="end of the manager")


@pytest.mark.processes
def test_a_manager_that_was_started_ends_when_nobody_needs_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    address = f"unix://{folder}/m.sock"
    assert ensure_manager(address, 60, idle_exit=0.5)
    found = managers(address)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{folder}/m.sock")
            with pytest.raises(AssertionError, match="not within"):
                eventually(lambda: not ensure_exists(found), 1.5)
        eventually(lambda: not ensure_exists(found), what="end of the manager")
    finally:
        for process in managers(address):
            os.kill(process, signal.SIGKILL)
    assert "nothing was connected for 0.5 s" in (folder / "manager.log").read_text()
    assert ensure_manager(address, 60, idle_exit=0.1), "and the next engine starts another"
    eventually(lambda: not managers(address), what="its end")


def ensure_exists(processes: list[int]) -> bool:
    """Whether one of them still runs (a zombie does not)."""
    for process in processes:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return True
        except OSError:
            continue
    return False
