"""Models without weights: no parameter takes memory, buffers are real."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit.core.skeleton import build_skeleton


class _Allocated(TorchDispatchMode):
    """Bytes of tensors that operations make on the CPU."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            self.largest = max(self.largest, result.nbytes)
        return result


def test_experts_larger_than_this_machine_take_no_memory() -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 4, "first_k_dense_replace": 1, "vocab_size": 1000}
    with _Allocated() as allocated:
        model = build_skeleton(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 30e9
    assert all(parameter.is_meta for parameter in model.parameters())
    assert allocated.largest < 2**26


def test_buffers_are_what_transformers_computes() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for model_type in ("llama", "gemma2", "gpt2", "opt", "mixtral"):
        config = (
            {**sizes, "model_type": model_type, "vocab_size": 100} if model_type != "gpt2" else {"model_type": "gpt2"}
        )
        skeleton = build_skeleton(config)
        kind = AutoConfig.for_model(model_type, **{key: value for key, value in config.items() if key != "model_type"})
        real = dict(AutoModelForCausalLM.from_config(kind).named_buffers())
        for name, buffer in skeleton.named_buffers():
            torch.testing.assert_close(buffer, real[name])
