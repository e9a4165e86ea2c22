"""The model of `gpu_vllm.py`: an 8B Llama shape (and a tiny one), with weights under which wrong KV shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""For a trial of this script on a CPU (`--tiny`)."""


_SHARP = 3.0
"""Queries and keys are so much larger than unit variance: attention then looks at a few tokens. Over thousands of tokens it
would otherwise be an average that hardly depends on them, and wrong KV would not show."""


def strong_weights(shape: Mapping[str, object]) -> None:
    """Make `load_format="dummy"` draw N(0, 1/fan_in), larger for queries and keys; equal in every process. `shape`: the model's
    configuration."""
    import torch
    from vllm.model_executor.model_loader import dummy_loader, weight_utils

    drawn = [0]
    heads = int(shape["num_attention_heads"]) + 2 * int(shape["num_key_value_heads"])  # type: ignore[call-overload]
    projected = heads * int(shape["head_dim"])  # type: ignore[call-overload]

    def draw(param: Any, *args: Any, **kwargs: Any) -> None:
        if not torch.is_floating_point(param):
            return
        drawn[0] += 1
        generator = torch.Generator(device=param.device).manual_seed(drawn[0])
        with torch.no_grad():
            if param.dim() < 2:
                param.fill_(1.0)
            else:
                fan_in = 1 if param.shape[0] > 100_000 or param.shape[0] == 1000 else param.shape[-1]
                scale = _SHARP if param.shape[0] == projected and param.shape[1] == shape["hidden_size"] else 1.0
                param.copy_(torch.empty_like(param).normal_(0.0, scale * fan_in**-0.5, generator=generator))

    load = dummy_loader.DummyModelLoader.load_weights

    def begin(loader: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        drawn[0] = 0
        load(loader, model, *args, **kwargs)

    dummy_loader.DummyModelLoader.load_weights = begin
    # Called through one or the other module, as the version has it.
    dummy_loader.initialize_single_dummy_weight = weight_utils.initialize_single_dummy_weight = draw
