"""Mixtures of experts: every expert quantized, written as checkpoints and runtimes name it, read by unmodified transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.api.run import Settings
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import ArchitectureError
from lowbit.core.streamed_model import StreamedModel
from lowbit.formats.reader import ArtifactCheckpoint

SMALL = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SMALL, "num_experts": 8, "head_dim": 16, "mlp_only_layers": [1]},
    "qwen2_moe": {**SMALL, "num_experts": 4, "shared_expert_intermediate_size": 64},
}
RECIPE: dict[str, Any] = {"bits": 4, "group_size": 32, "dataset": "pydoc", "seq_len": 64}


@pytest.fixture(scope="module", params=list(KINDS))
def sparse(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Path:
    return make_model(request.param, **KINDS[request.param])


def test_taken_apart_it_computes_what_transformers_does(sparse: Path) -> None:
    model = StreamedModel(open_checkpoint(sparse), torch.device("cpu"), torch.float32)
    ids = torch.randint(1, 500, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.outside():
        hidden = model.embed(ids)
        for index in range(len(model.blocks)):
            with model.block(index) as block:
                hidden = model.run_block(index, block, hidden)
        ours = model.logits(hidden)
        theirs = AutoModelForCausalLM.from_pretrained(sparse, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_all_experts_are_quantized_and_transformers_reads_them(sparse: Path, tmp_path: Path, method: str) -> None:
    result = lowbit.quantize(sparse, output=tmp_path / "out", method=method, num_samples=12, **RECIPE)
    stored = open_checkpoint(sparse).tensors
    expected = {name.removesuffix(".weight") for name in stored if ".experts." in name}
    assert expected <= set(result.record["layers"]), "an expert was left out"
    assert all(0 < layer["error"] < 0.3 for layer in result.record["layers"].values())
    artifact = ArtifactCheckpoint(open_checkpoint(tmp_path / "out"), torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(sparse, dtype=torch.float32)
    back = StreamedModel(artifact, torch.device("cpu"), torch.float32)
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(1, 500, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), back.outside():
        hidden = back.embed(ids)
        for index in range(len(back.blocks)):
            with back.block(index) as block:
                hidden = back.run_block(index, block, hidden)
        ours, theirs = back.logits(hidden), served(ids).logits
        original = dense(ids).logits
    assert (ours - theirs).norm() < 0.05 * (ours - original).norm()


def test_experts_that_saw_little_fall_back_and_say_so(make_model: Callable[..., Path], tmp_path: Path) -> None:
    sparse = make_model("qwen3_moe", **{**KINDS["qwen3_moe"], "num_experts": 32, "num_experts_per_tok": 1})
    result = lowbit.quantize(sparse, output=tmp_path / "out", method="gptq", num_samples=4, **RECIPE)
    layers = result.record["layers"]
    few = {path for path, layer in layers.items() if any("fewer tokens" in note for note in layer.get("notes", []))}
    assert few, "256 tokens for 32 experts of 64 inputs"
    assert all(".experts." in path for path in few)
    assert any(".experts." in path for path in set(layers) - few)
    assert all(0 <= layer["error"] < 0.5 for layer in layers.values())
    assert result.measurement is not None
    assert result.measurement["kl"] < 1


def test_experts_in_a_layout_that_is_not_known_are_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16)
    with pytest.raises(ArchitectureError, match="experts"):
        lowbit.quantize(folder, output=tmp_path / "out", method="rtn", group_size=32, settings=Settings(verify=False))
    assert list(tmp_path.iterdir()) == []
