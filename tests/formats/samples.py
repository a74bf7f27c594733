"""Random quantized layers and a tiny model to store them in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import Scheme, WeightScheme


def random_codes(weights: WeightScheme, rows: int, columns: int, scale_dtype: torch.dtype, seed: int = 0) -> QTensor:
    """A layer with every code, zero point and (for a reordered scheme) group index drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    groups = weights.groups(columns)
    shape = {"tensor": (1, 1), "block": (-(-rows // (weights.group_size or 1)), groups)}.get(
        weights.granularity, (rows, groups)
    )
    codes = torch.randint(0, 2**weights.bits, (rows, columns), generator=draw, dtype=torch.uint8)
    if weights.kind == "float":
        codes = torch.randn(rows, columns, generator=draw).to(torch.float8_e4m3fn)
    zero = None
    if weights.kind == "int" and not weights.symmetric:
        zero = torch.randint(0, 2**weights.bits, (rows, groups), generator=draw, dtype=torch.uint8)
    index = torch.randint(0, groups, (columns,), generator=draw, dtype=torch.int32) if weights.reordered else None
    scale = (torch.rand(shape, generator=draw) * 0.02 + 0.002).to(scale_dtype)
    return QTensor(codes, scale, weights, zero, index)


def assert_same(left: QTensor, right: QTensor) -> None:
    """Every number and the scheme are equal."""
    assert left.scheme == right.scheme
    assert torch.equal(left.codes.float(), right.codes.float())
    assert left.codes.dtype == right.codes.dtype
    assert left.scale.dtype == right.scale.dtype
    assert torch.equal(left.scale.float(), right.scale.float())
    for mine, other in ((left.zero, right.zero), (left.group_index, right.group_index)):
        assert (mine is None) == (other is None)
        assert mine is None or (torch.equal(mine, other) and mine.dtype == other.dtype)
    assert set(left.extra or {}) == set(right.extra or {})
    for name, tensor in (left.extra or {}).items():
        assert torch.equal(tensor, (right.extra or {})[name])


def assert_layout(layout: dict[str, Any], stored: dict[str, Tensor]) -> None:
    """What was foretold is what was stored."""
    foretold = {suffix: (spec.dtype, spec.shape) for suffix, spec in layout.items()}
    assert foretold == {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in stored.items()}


def tiny_llama(dtype: torch.dtype, hidden: int = 64, intermediate: int = 128) -> nn.Module:
    """A random two-layer LlamaForCausalLM with untied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model: nn.Module = LlamaForCausalLM(config).to(dtype).eval()
    return model


def linear_names(model: nn.Module) -> list[str]:
    """Paths of the linear layers in the decoder blocks."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def store(
    folder: Path,
    model: nn.Module,
    fmt: Any,
    scheme_of: Callable[[str], Scheme | None],
    quantize: Callable[[str, Tensor, Scheme], QTensor],
) -> nn.Module:
    """Write `model` as an artifact of format `fmt` and give it the dequantized weights."""
    dtype = next(model.parameters()).dtype
    layers = {name: scheme for name in linear_names(model) if (scheme := scheme_of(name)) is not None}
    skipped = [name for name in linear_names(model) if name not in layers]
    stored, state = {}, model.state_dict()
    for name, scheme in layers.items():
        tensor = quantize(name, state.pop(f"{name}.weight"), scheme)
        for suffix, data in fmt.encode(tensor, scheme, dtype).items():
            stored[f"{name}.{suffix}"] = data
        model.get_submodule(name).weight.data = tensor.dequantize(dtype)
    save_file({**state, **stored}, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": fmt.quantization_config(layers, [*skipped, "lm_head"])}
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in fmt.files(config["quantization_config"]).items():
        (folder / name).write_text(json.dumps(content))
    return model


def logits(model: nn.Module) -> Tensor:
    """Logits of a fixed prompt, in float32."""
    tokens = torch.arange(1, 25).reshape(2, 12)
    with torch.no_grad():
        return model(tokens).logits.float()


def load(folder: Path, dtype: torch.dtype, **options: Any) -> nn.Module:
    """The artifact, loaded by unmodified transformers."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    return model
