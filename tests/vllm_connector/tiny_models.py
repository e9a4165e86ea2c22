"""Tiny models for vLLM on a CPU, with weights strong enough that wrong KV shows in the tokens. No downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 1000

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
}

OTHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 64,
        "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "gemma4": {  # window layers with heads of another size than full attention's
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 64,
        "head_dim": 32,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "mla": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "head_dim": None,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 2,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "moe_intermediate_size": 64,
    },
    "qwen3next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
}


def write_model(folder: Path, kind: str = "llama") -> Path:
    """A model directory with a configuration; the weights are drawn by `draw_strong_weights` at load."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (LLAMA | OTHERS[kind]).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_llama_weights(folder: Path, std: float = 0.08) -> None:
    """The weights of the tiny Llama as a file, for engines whose workers are processes of their own."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    hidden, inner, vocabulary = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["vocab_size"]
    queries, keys = LLAMA["num_attention_heads"] * LLAMA["head_dim"], LLAMA["num_key_value_heads"] * LLAMA["head_dim"]
    weights = {
        "model.embed_tokens.weight": draw(vocabulary, hidden) * 10,
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": draw(vocabulary, hidden),
    }
    for layer in range(LLAMA["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.self_attn.q_proj.weight": draw(queries, hidden),
            f"{prefix}.self_attn.k_proj.weight": draw(keys, hidden),
            f"{prefix}.self_attn.v_proj.weight": draw(keys, hidden),
            f"{prefix}.self_attn.o_proj.weight": draw(hidden, queries),
            f"{prefix}.mlp.gate_proj.weight": draw(inner, hidden),
            f"{prefix}.mlp.up_proj.weight": draw(inner, hidden),
            f"{prefix}.mlp.down_proj.weight": draw(hidden, inner),
            f"{prefix}.input_layernorm.weight": torch.ones(hidden),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
        }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


def write_adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter for the tiny Llama, strong enough to show."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    hidden, rank = LLAMA["hidden_size"], 8
    outputs = {
        "q_proj": LLAMA["num_attention_heads"] * LLAMA["head_dim"],
        "v_proj": LLAMA["num_key_value_heads"] * LLAMA["head_dim"],
    }
    weights = {}
    for layer in range(LLAMA["num_hidden_layers"]):
        for name, size in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) * 0.2
            weights[f"{prefix}.lora_B.weight"] = torch.randn(size, rank, generator=generator) * 0.2
    save_file(weights, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": list(outputs), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    return folder


def draw_strong_weights(std: float = 0.08) -> None:
    """Make `load_format="dummy"` draw N(0, std), the same in every process; vLLM's own +-1e-3 hides wrong KV."""
    import torch
    from vllm.model_executor.model_loader import dummy_loader

    drawn = [0]

    def draw(param: torch.Tensor, *args: object, **kwargs: object) -> None:
        if not torch.is_floating_point(param):
            return
        drawn[0] += 1
        generator = torch.Generator().manual_seed(drawn[0])
        if param.dim() >= 2:
            scale = std * (10 if max(param.shape) >= VOCABULARY else 1)
            values = torch.randn(param.shape, generator=generator) * scale
        else:
            values = 1.0 + 0.1 * torch.randn(param.shape, generator=generator)
        param.data.copy_(values)

    def begin(loader: object, model: torch.nn.Module, *args: object, **kwargs: object) -> None:
        drawn[0] = 0
        load(loader, model, *args, **kwargs)

    load = dummy_loader.DummyModelLoader.load_weights
    dummy_loader.DummyModelLoader.load_weights = begin
    dummy_loader.initialize_single_dummy_weight = draw


def prompt(seed: int, length: int) -> list[int]:
    """Token ids that differ in every block between seeds."""
    return [(index * 7919 + seed * 104_729 + (index * index * seed) % 613) % (VOCABULARY - 10) + 5 for index in range(length)]
