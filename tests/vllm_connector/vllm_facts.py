"""As much of vLLM's configuration as names depend on, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vcache.integrations.vllm.kv_group import KVGroup

GROUP = KVGroup(("layer.0", "layer.1"), 16, 16, 8, 128, "bfloat16", False, 8192)


def facts(**changes: Any) -> Any:
    """As much of a `VllmConfig` as names depend on; `changes` are `section__name=value`."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model="m", revision=None, quantization=None, seed=0, hf_config={"rope_theta": 1e4}, layers=32
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        load_config=SimpleNamespace(load_format="auto"),
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256", cache_dtype="auto"),
        speculative_config=None,
    )
    for name, value in changes.items():
        section, _, key = name.partition("__")
        setattr(getattr(config, section), key, value) if key else setattr(config, section, value)
    model = config.model_config
    model.hf_config = SimpleNamespace(to_dict=lambda data=model.hf_config: data)
    model.get_total_num_hidden_layers = lambda: model.layers
    return config
