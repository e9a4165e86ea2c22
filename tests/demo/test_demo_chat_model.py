"""`--model`: what it may name, what is read of it, and the memory that follows."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from vcache.demo import DemoError
from vcache.demo.chat_model import KV_TOKENS, ChatModel, cache_bytes, chat_model, pool_bytes, read_config, token_bytes
from vcache.errors import ArgumentError

SMOL = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "head_dim": 64}
LLAMA_8B = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
GIB = 2**30


def test_a_folder_and_a_name_on_the_hub_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "m").mkdir(parents=True)
    (tmp_path / "org" / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = ChatModel(str(tmp_path / "org" / "m"), on_hub=False)
    assert [chat_model(name) for name in ("org/m", "./org/m/", "~/org/m", folder.name)] == [folder] * 4
    assert chat_model("Qwen/Qwen2.5-7B-Instruct") == ChatModel("Qwen/Qwen2.5-7B-Instruct", on_hub=True)
    assert chat_model("gpt2").on_hub


@pytest.mark.parametrize("name", ["./none", "/none/such", "~/none", "", "a/b/c", "a b", "org/", "https://huggingface.co/a/b"])
def test_what_can_be_neither_is_one_clear_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=r"^--model: (neither a folder nor a name|no model is in)"):
        chat_model(name)


def test_a_folder_without_a_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"--model: no model is in .*: it has no config\.json"):
        chat_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        (SMOL, "bfloat16", 23040),
        (SMOL, "float32", 46080),
        (SMOL, "auto", 23040),
        (LLAMA_8B, "auto", 131072),
        (LLAMA_8B | {"num_key_value_heads": None, "head_dim": None}, "auto", 524288),
        ({"num_hidden_layers": 27, "num_attention_heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, "auto", 31104),
    ],
)
def test_kv_of_a_token(config: dict[str, Any], dtype: str, expected: int) -> None:
    assert token_bytes(config, dtype) == expected


def test_a_configuration_that_does_not_say_it_is_one_clear_error() -> None:
    with pytest.raises(DemoError, match=r"--model: cannot tell the size of its KV .*num_attention_heads"):
        token_bytes({"num_hidden_layers": 4}, "auto")
    with pytest.raises(DemoError, match="--model: cannot tell the size"):
        token_bytes(LLAMA_8B | {"num_attention_heads": [8, 16]}, "auto")


def test_pool_and_caches_hold_what_the_story_needs() -> None:
    for per_token in (23040, 46080, 131072, 524288):
        assert pool_bytes(per_token, 5800) >= 3 * 23 * 256 * per_token
        assert pool_bytes(per_token, 5800) % 2**26 == 0
        assert cache_bytes(per_token) >= KV_TOKENS * per_token
        assert cache_bytes(per_token) % GIB == 0
    assert cache_bytes(23040) == cache_bytes(46080) == GIB
    assert cache_bytes(131072) == 3 * GIB


@pytest.mark.processes
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize(
    ("written", "per_token"),
    [
        ({"model_type": "llama", **LLAMA_8B}, 131072),
        ({"model_type": "llava", "text_config": {"model_type": "llama", **LLAMA_8B}}, 131072),
        ({"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768}, 36864),
    ],
    ids=["plain", "text part of several", "other names"],
)
def test_a_configuration_is_read_as_transformers_understands_it(
    written: dict[str, Any], per_token: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert token_bytes(read_config(tmp_path, chat_model(str(tmp_path))), "auto") == per_token


@pytest.mark.processes
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_a_model_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(
        DemoError, match=r"model config \(pid \d+\) ended with code 1; .*nothing-known.* \(log: .*model-config\.log"
    ):
        read_config(tmp_path, chat_model(str(tmp_path)))
