"""The streamed model computes what the whole model computes, for every family of the table."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit.core.architectures import ARCHITECTURES
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import ArchitectureError, CheckpointError
from lowbit.core.streamed_model import StreamedModel, _guess_architecture

CPU = torch.device("cpu")
EXTRA: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7},
    "qwen3": {"head_dim": 32},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32},
    # every expert sees every token
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 2, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 2},
}


def stream(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = StreamedModel(open_checkpoint(folder), CPU, torch.float32)
    with torch.no_grad():
        with model.outside():
            hidden = model.embed(ids)
        for index in range(len(model.blocks)):
            with model.block(index) as block:
                hidden = model.run_block(index, block, hidden)
        with model.outside():
            return model.logits(hidden)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_equals_the_whole_model(model_type: str, make_model: Callable[..., Path]) -> None:
    folder = make_model(model_type, **EXTRA.get(model_type, {}))
    ids = torch.randint(1, 500, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    assert whole.std() > 1e-3
    torch.testing.assert_close(stream(folder, ids), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_table_lists_every_linear_layer_and_groups_those_that_share_an_input(
    model_type: str, make_model: Callable[..., Path]
) -> None:
    model = StreamedModel(open_checkpoint(make_model(model_type, **EXTRA.get(model_type, {}))), CPU, torch.float32)
    seen: dict[str, int] = {}
    with torch.no_grad():
        with model.outside():
            hidden = model.embed(torch.arange(1, 9)[None])
        with model.block(0) as block:
            matrices = [
                name for name, child in block.named_modules() if getattr(child, "weight", torch.empty(0)).dim() == 2
            ]
            for name in matrices:
                block.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, name=name: seen.__setitem__(name, args[0].data_ptr())
                )
            model.run_block(0, block, hidden)
    table = [group for group in model.architecture.linears if group[0] in matrices]
    routers = {name for name in matrices if name.endswith("gate")}
    named, run = [name for group in table for name in group], [name for name in seen if name not in routers]
    if model.architecture.experts:  # one expert after another; the table has the same layer of all experts side by side
        named, run = sorted(named), sorted(run)
    assert named == run
    for group in table:
        assert len({seen[name] for name in group}) == 1


def test_memory_holds_one_block(tiny_llama: Path) -> None:
    model = StreamedModel(open_checkpoint(tiny_llama), CPU, torch.float32)
    with model.block(1):
        held = [name for name, parameter in model.skeleton.named_parameters() if not parameter.is_meta]
        assert held
        assert all(name.startswith("model.layers.1.") for name in held)
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())


def test_unknown_type_with_blocks_is_guessed(make_model: Callable[..., Path]) -> None:
    folder = make_model("stablelm")
    model = StreamedModel(open_checkpoint(folder), CPU, torch.float32)
    assert not model.known
    assert model.architecture.blocks == "model.layers"
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(stream(folder, ids), whole, rtol=1e-5, atol=1e-5)


def test_model_without_blocks_names_the_table() -> None:
    with pytest.raises(ArchitectureError, match="no list of equal blocks") as caught:
        _guess_architecture("odd", torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert "ARCHITECTURES" in str(caught.value.hint)


def test_wrong_shape_and_missing_tensor_are_named(tiny_llama: Path) -> None:
    real = open_checkpoint(tiny_llama)
    short = SimpleNamespace(config={**real.config, "intermediate_size": 256}, tensors=real.tensors, location=tiny_llama)
    with pytest.raises(CheckpointError, match=r"has shape \[128, 64\]|has shape \[64, 128\]"):
        StreamedModel(short, CPU, torch.float32)
    deep = SimpleNamespace(config={**real.config, "num_hidden_layers": 4}, tensors=real.tensors, location=tiny_llama)
    with pytest.raises(CheckpointError, match="lacks the tensor 'model.layers.3"):
        StreamedModel(deep, CPU, torch.float32)
