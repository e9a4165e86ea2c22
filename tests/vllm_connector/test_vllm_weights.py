"""Two models whose configurations are equal, and whose weights are not, must not share a chunk. Needs no vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_facts import facts

from vcache.integrations.vllm.kv_group import DeclinedError
from vcache.integrations.vllm.weights import MIN_SAMPLES, SAMPLE, SAMPLES, Adapters, fingerprint, of_model

TENSOR = 5 * SAMPLE


def write(folder: Path, tensors: int = 3, changed: int = -1, name: str = "model.safetensors") -> Path:
    """A safetensors file of so many tensors, of which one is another than usual."""
    folder.mkdir(parents=True, exist_ok=True)
    header = {
        f"t{i}": {"dtype": "U8", "shape": [TENSOR], "data_offsets": [i * TENSOR, (i + 1) * TENSOR]} for i in range(tensors)
    }
    text = json.dumps(header).encode()
    data = b"".join(bytes([0xFF if i == changed else i]) * TENSOR for i in range(tensors))
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def local(folder: Path | str, **changes: Any) -> str:
    return of_model(facts(model_config__model=str(folder), **changes))


class TestFingerprint:
    def test_it_is_of_what_files_hold_not_of_where_they_lie_or_of_their_times(self, tmp_path: Path) -> None:
        one, other = write(tmp_path / "a"), write(tmp_path / "b" / "c")
        os.utime(other / "model.safetensors", (1, 1))
        (other / "README.md").write_text("of no account")
        assert local(one) == local(other)

    @pytest.mark.parametrize("changed", range(40))
    def test_one_tensor_of_many_is_enough(self, tmp_path: Path, changed: int) -> None:
        """Fine-tunes with most layers frozen differ in the rest only, in files of equal names and sizes."""
        assert local(write(tmp_path / "a", 40)) != local(write(tmp_path / "b", 40, changed))

    def test_header_names_and_number_of_files_count(self, tmp_path: Path) -> None:
        found = [fingerprint(write(tmp_path / "a")), fingerprint(write(tmp_path / "b", name="other.safetensors"))]
        found.append(fingerprint(write(write(tmp_path / "c"), name="more.safetensors")))
        file = write(tmp_path / "d") / "model.safetensors"
        file.write_bytes(file.read_bytes().replace(b'"t0"', b'"t9"'))
        found.append(fingerprint(file.parent))
        assert len(set(found)) == 4

    @pytest.mark.parametrize("suffix", ["bin", "pt", "gguf", "safetensors"])
    @pytest.mark.parametrize("where", [0, 7 * SAMPLE + 9, -1])
    def test_files_that_are_no_safetensors_are_sampled_evenly(self, tmp_path: Path, suffix: str, where: int) -> None:
        found = []
        for value in (0, 1):
            data = bytearray(64 * SAMPLE)
            data[where] = value
            file = tmp_path / f"{value}" / f"model.{suffix}"
            file.parent.mkdir()
            file.write_bytes(data)
            found.append(local(file.parent))
            assert local(file) == found[-1], "a file is as good as its folder"
        assert found[0] != found[1]

    def test_large_files_cost_little(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(4):
            with (tmp_path / f"model-{number}.bin").open("wb") as file:
                file.truncate(2**38)
        read: list[int] = []
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda *args: (read.append(args[1]), pread(*args))[1])
        assert local(tmp_path)
        assert sum(read) == SAMPLES * SAMPLE
        for number in range(2 * SAMPLES // MIN_SAMPLES):
            (tmp_path / f"part-{number:05}.bin").touch()
        assert local(tmp_path)

    @pytest.mark.parametrize(
        "header",
        [
            b"",
            b"nonsense",
            b"[1]",
            b'{"t": {}}',
            b'{"t": {"data_offsets": [-9000000, -8000000]}}',
            b'{"t": {"data_offsets": [0, 99999999999999999999999]}}',
            b'{"t": {"data_offsets": ["a", "b"]}}',
            b'{"__metadata__": {}}',
        ],
    )
    def test_headers_that_are_none(self, tmp_path: Path, header: bytes) -> None:
        file = tmp_path / "model.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
        one = local(tmp_path)
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(99) + b"x")
        assert local(tmp_path) != one


class TestModels:
    def test_a_name_on_the_hub_is_its_snapshot_and_counts_with_its_commit(self, tmp_path: Path) -> None:
        """The branch moves on while an engine runs: it loaded what its configuration was read with."""
        pytest.importorskip("huggingface_hub")
        repository = tmp_path / "models--org--model"
        found = {}
        for commit in ("a" * 40, "b" * 40):
            write(repository / "snapshots" / commit)
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / "main").write_text(commit)
            at = {"model_config__model": "org/model", "load_config__download_dir": str(tmp_path)}
            found[commit] = of_model(facts(**at))
            assert found[commit].startswith(commit)
        config = facts(**at)
        config.model_config.hf_config._commit_hash = "a" * 40
        assert of_model(config) == found["a" * 40]
        assert of_model(facts(**at, model_config__revision="b" * 40)) == found["b" * 40]

    def test_dummy_weights_are_their_seed(self, tmp_path: Path) -> None:
        dummy = {"load_config__load_format": "dummy"}
        assert local("nowhere", **dummy) == local(write(tmp_path), **dummy)
        assert local("nowhere", **dummy) != local("nowhere", **dummy, model_config__seed=1)

    @pytest.mark.parametrize(
        ("model", "changes"),
        [
            ("s3://bucket/model", {}),
            ("/nowhere", {}),
            ("org/never-downloaded", {}),
            ("{folder}", {"load_config__load_format": "tensorizer"}),
            ("{folder}", {"load_config__load_format": "my_own_loader"}),
            ("{folder}", {"model_config__model_weights": "s3://bucket/model"}),
            ("{empty}", {}),
        ],
    )
    def test_weights_that_cannot_be_read_are_declined_until_they_are_named(
        self, tmp_path: Path, model: str, changes: dict[str, Any]
    ) -> None:
        pytest.importorskip("huggingface_hub")
        (tmp_path / "empty").mkdir()
        model = model.format(folder=write(tmp_path / "m"), empty=tmp_path / "empty")
        changes["load_config__download_dir"] = str(tmp_path)
        with pytest.raises(DeclinedError, match='set "weights" in kv_connector_extra_config'):
            local(model, **changes)
        config = facts(model_config__model=model, **changes)
        assert of_model(config, "v1") != of_model(config, "v2")

    def test_a_drafter_has_weights_too(self, tmp_path: Path) -> None:
        target, one, other = write(tmp_path / "t"), write(tmp_path / "a"), write(tmp_path / "b", 3, 1)

        def drafted(folder: Path) -> str:
            draft = SimpleNamespace(model=str(folder), hf_config=None, revision=None, seed=0)
            return local(target, speculative_config=SimpleNamespace(draft_model_config=draft, draft_load_config=None))

        assert len({drafted(one), drafted(other), local(target)}) == 3
        assert drafted(target) == local(target), "layers of the target itself"


class TestAdapters:
    def lora(self, path: Path | str, number: int = 1) -> Any:
        return SimpleNamespace(lora_name="tuned", lora_int_id=number, lora_path=str(path))

    def adapter(self, folder: Path, changed: int = -1, alpha: int = 16) -> Path:
        write(folder, changed=changed, name="adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(f'{{"lora_alpha": {alpha}}}')
        return folder

    def test_two_adapters_of_one_name_and_path_differ(self, tmp_path: Path) -> None:
        """On two hosts, or one after the other: the name and the path were all that told them apart."""
        names = set()
        for changed, alpha in ((-1, 16), (1, 16), (-1, 32)):
            lora = self.lora(self.adapter(tmp_path / "adapter", changed, alpha))
            names.add(Adapters().name(lora))
            assert Adapters().name(lora) in names
        assert len(names) == 3
        assert Adapters().name(None) == b""

    def test_files_are_read_once_for_each_adapter_that_is_loaded(self, tmp_path: Path) -> None:
        adapters, folder = Adapters(), self.adapter(tmp_path)
        loaded = adapters.name(self.lora(folder))
        self.adapter(tmp_path, 1)
        assert adapters.name(self.lora(folder)) == loaded, "what is loaded is still the same"
        assert adapters.name(self.lora(folder, 2)) != loaded
        adapters.forget()
        assert adapters.name(self.lora(folder)) != loaded

    def test_one_whose_files_are_not_here_is_not_told_from_others(self, tmp_path: Path) -> None:
        adapters = Adapters()
        assert adapters.name(self.lora(tmp_path)) is None
        assert adapters.name(self.lora("/nowhere")) is None
        self.adapter(tmp_path)
        assert adapters.name(self.lora(tmp_path)), "it is looked for again"
