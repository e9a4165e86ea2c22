"""Which model the engines run, and how much memory its KV takes.

usage: python -m vcache.demo.chat_model NAME_OR_PATH FILE    writes what `token_bytes` needs to FILE, as JSON
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..config import CacheConfig
from ..errors import ArgumentError
from . import DemoError
from .processes import Process, guarded

CONFIG_READ = 300.0
"""Seconds for reading a configuration, which may have to be fetched first."""
KV_TOKENS = 20_000
"""Tokens that an instance must be able to keep: B's prompt, of at most 8,192, with a salt and without, and the warm-up."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_GIB = 2**30
_FIELDS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
_MLA_FIELDS = ("kv_lora_rank", "qk_rope_head_dim")


class ChatModel(NamedTuple):
    """A model that engines can load: the demo's own, or one that the user named."""

    name: str
    """A folder, absolute, or a name on the Hugging Face hub."""
    on_hub: bool
    revision: str = ""
    """Digest of the demo's own model; empty for the user's."""


def chat_model(wanted: str) -> ChatModel:
    """What `--model` means. Raises `ArgumentError` for what can be neither a model's folder nor a name on the hub."""
    folder = Path(wanted).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ArgumentError(f"--model: no model is in {folder}: it has no config.json")
        return ChatModel(str(folder.absolute()), on_hub=False)
    if wanted.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(wanted):
        raise ArgumentError(f"--model: neither a folder nor a name on the Hugging Face hub: {wanted!r}")
    return ChatModel(wanted, on_hub=True)


def read_config(folder: Path, model: ChatModel) -> dict[str, Any]:
    """The model's configuration, as transformers understands it, read in a process of its own that logs to `folder`. Blocks for
    seconds, longer when it is fetched. Raises `DemoError`."""
    out = folder / "model-config.json"
    command = guarded("vcache.demo.chat_model", model.name, str(out))
    with Process("model config", command, folder, offline=not model.on_hub) as reader:
        reader.finish(CONFIG_READ)
    config: dict[str, Any] = json.loads(out.read_text())
    return config


def token_bytes(config: Mapping[str, Any], dtype: str) -> int:
    """Bytes of KV per token, or somewhat more: layers without a KV cache count as well. Raises `DemoError` when the
    configuration does not say it. Pure."""
    try:
        if config.get("kv_lora_rank"):  # MLA: one latent for keys and values of all heads
            row = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        else:
            heads = config["num_attention_heads"]
            row = 2 * (config.get("num_key_value_heads") or heads) * (config.get("head_dim") or config["hidden_size"] // heads)
        return int(config["num_hidden_layers"]) * int(row) * (4 if dtype == "float32" else 2)
    except (KeyError, TypeError) as error:
        raise DemoError(f"--model: cannot tell the size of its KV from its configuration ({error})") from None


def pool_bytes(per_token: int, tokens: int) -> int:
    """Payload bytes to lend: the document three times (once under each salt and question), in whole 64 MiB. Pure."""
    chunk = CacheConfig().chunk_size
    step = 64 * 2**20
    return -(-per_token * chunk * 3 * (tokens // chunk + 2) // step) * step


def cache_bytes(per_token: int) -> int:
    """KV cache of an instance: `KV_TOKENS` in whole GiB. Pure."""
    return -(-per_token * KV_TOKENS // _GIB) * _GIB


def main() -> None:
    from transformers import AutoConfig

    _, name, out = sys.argv
    # Of a model that also sees or hears: the part that has the KV.
    config = AutoConfig.from_pretrained(name).get_text_config()
    fields = {field: getattr(config, field, None) for field in (*_FIELDS, *_MLA_FIELDS)}
    Path(out).write_text(json.dumps({field: value for field, value in fields.items() if value is not None}))


if __name__ == "__main__":  # in a process of its own, by `read_config`
    main()
