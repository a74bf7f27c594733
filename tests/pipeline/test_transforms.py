"""Transforms and cache scales inside the streaming pipeline: what they gain, what is stored, and that resuming keeps it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.api.run import Settings
from lowbit.core.errors import ArchitectureError, FormatError, RecipeError
from lowbit.core.progress import Silent

CALIBRATION: dict[str, Any] = {"dataset": "pydoc", "num_samples": 8, "seq_len": 64}
NO_VERIFY = Settings(verify=False)
# a random model has no sure next token: judge by KL alone
BY_KL = Settings(max_kl=3)


@pytest.fixture(scope="module")
def uneven(make_model: Callable[..., Path]) -> Path:
    """A llama whose norms let a few channels through much more strongly, as real models do."""
    from safetensors.torch import save_file

    model = make_model()
    state = load_file(model / "model.safetensors")
    for name, tensor in state.items():
        if "layernorm" in name:
            tensor[::7] *= 12
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_awq_lowers_the_divergence(uneven: Path, tmp_path: Path, method: str) -> None:
    options = {"rtn": {"search": False}, "gptq": {}}[method]
    shared = {"method": method, "bits": 3, "group_size": 64, "format": "compressed-tensors", "options": options}
    kl = {}
    for name, transforms in (("plain", []), ("awq", ["awq"])):
        result = lowbit.quantize(
            uneven, output=tmp_path / name, transforms=transforms, settings=BY_KL, **shared, **CALIBRATION
        )
        assert result.measurement is not None
        kl[name] = result.measurement["kl"]
    assert kl["awq"] < kl["plain"]


@pytest.mark.parametrize(
    "changes", [{"method": "awq", "format": "awq"}, {"method": "gptq", "transforms": ["smoothquant", "awq"]}]
)
def test_resuming_after_a_crash_gives_the_same_bytes(uneven: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    class Crash(Silent):
        blocks = 0

        def advance(self) -> None:
            self.blocks += 1
            if self.blocks == 2:
                raise KeyboardInterrupt

    recipe = {"group_size": 32, **changes, **CALIBRATION}
    whole = lowbit.quantize(uneven, output=tmp_path / "whole", settings=NO_VERIFY, **recipe)
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(uneven, output=tmp_path / "cut", settings=NO_VERIFY, progress=Crash(), **recipe)
    resumed = lowbit.quantize(uneven, output=tmp_path / "cut", settings=NO_VERIFY, **recipe)
    assert resumed.run["resumed_blocks"] == 2
    assert resumed.record["checksums"] == whole.record["checksums"]
    norms = load_file(whole.path / "model.safetensors")
    before = load_file(uneven / "model.safetensors")
    assert not torch.equal(
        norms["model.layers.1.input_layernorm.weight"], before["model.layers.1.input_layernorm.weight"]
    )
    assert torch.equal(norms["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.parametrize("model_type", ["phi3", "gemma2", "opt", "qwen3", "gpt2"])
def test_awq_on_other_families(make_model: Callable[..., Path], tmp_path: Path, model_type: str) -> None:
    sizes = {"opt": {"ffn_dim": 128, "word_embed_proj_dim": 64}, "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2}}
    model = make_model(model_type, **sizes.get(model_type, {}))
    result = lowbit.quantize(
        model, output=tmp_path / "out", method="rtn", bits=8, group_size=0, transforms=["awq"], **CALIBRATION
    )
    assert result.measurement is not None
    assert result.measurement["kl"] < 0.05


def test_the_module_objective_runs_and_helps(uneven: Path, tmp_path: Path) -> None:
    shared = {"method": "rtn", "bits": 3, "group_size": 64, "options": {"search": False}, **CALIBRATION}
    plain = lowbit.quantize(uneven, output=tmp_path / "plain", settings=BY_KL, **shared)
    transforms = {"awq": {"objective": "module"}}
    exact = lowbit.quantize(uneven, output=tmp_path / "exact", transforms=transforms, settings=BY_KL, **shared)
    assert plain.measurement is not None
    assert exact.measurement is not None
    assert exact.measurement["kl"] < plain.measurement["kl"]


def test_a_wrong_row_of_the_table_is_noticed(uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lowbit.transforms.scaling.Place.to_columns", lambda self, scales: scales.flip(0).repeat(self.repeat)
    )
    with pytest.raises(ArchitectureError, match="changed what model.layers.0 computes"):
        lowbit.quantize(uneven, output=tmp_path / "out", method="int8_sq", settings=NO_VERIFY, **CALIBRATION)


@pytest.mark.parametrize(
    ("format", "names"),
    [
        ("compressed-tensors", ("self_attn.k_scale", "self_attn.v_scale")),
        ("modelopt", ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale")),
    ],
)
def test_cache_scales_bound_keys_and_values(uneven: Path, tmp_path: Path, format: str, names: tuple[str, str]) -> None:
    result = lowbit.quantize(
        uneven, output=tmp_path / "out", method="fp8_static", format=format, kv_cache="fp8", **CALIBRATION
    )
    stored = load_file(result.path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(uneven, dtype=torch.float32)
    from lowbit.core.checkpoint import open_checkpoint
    from lowbit.core.text import token_windows
    from lowbit.core.tokenizer import load_tokenizer

    windows = token_windows("pydoc", load_tokenizer(open_checkpoint(uneven)), 8, 64, 0)
    with torch.no_grad():
        cache = model(windows, use_cache=True).past_key_values
    largest = [cache.layers[0].keys.abs().max().item(), cache.layers[0].values.abs().max().item()]
    scales = [stored[f"model.layers.0.{name}"].item() * 448 for name in names]
    assert largest[0] * 0.9 <= scales[0] <= largest[0] * 2
    assert scales[1] == pytest.approx(largest[1], rel=0.1)
    config = open_checkpoint(result.path).config["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8


def test_cache_scales_are_refused_where_they_cannot_be(
    make_model: Callable[..., Path], uneven: Path, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match="no scales for a KV cache"):
        lowbit.quantize(uneven, output=tmp_path / "out", method="rtn", group_size=32, format="gptq", kv_cache="fp8")
    with pytest.raises(RecipeError, match="no separate key and value"):
        lowbit.quantize(make_model("phi3"), output=tmp_path / "out", method="fp8", kv_cache="fp8")
