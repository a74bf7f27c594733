"""lowbit fit for compressed-tensors, on a tiny model: sizes as promised, fused layers alike, transformers loads it."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lowbit
from lowbit.api.fit_layers import fit_layers
from lowbit.api.quantize import plan, recipe_for
from lowbit.api.run import Settings
from lowbit.cli import app
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import RecipeError
from lowbit.formats.reader import ArtifactCheckpoint
from lowbit.recipe import Calibration

TEXT = Calibration(dataset="pydoc", num_samples=4, seq_len=64)


def size_of(model: Path, **changes: object) -> int:
    recipe = recipe_for("gptq").updated(**{"group_size": "auto", **changes})
    return plan(model, recipe=recipe)[0].nbytes


def test_recipe_gives_an_artifact_within_the_budget(tiny_llama: Path, tmp_path: Path) -> None:
    small, large = size_of(tiny_llama), size_of(tiny_llama, bits=8, group_size=0)
    budget = (small + large) // 2
    found = fit_layers(tiny_llama, size=budget, calibration=TEXT)
    assert found.bound <= found.kl < found.like["4 bits g64"][1]
    made = lowbit.quantize(tiny_llama, output=tmp_path / "m", recipe=found.recipe, settings=Settings(verify=False))
    stored = sum(file.stat().st_size for file in made.path.glob("*.safetensors"))
    assert found.nbytes <= budget
    assert stored == pytest.approx(found.nbytes, rel=0.05)  # a tiny model's header is a few percent
    artifact = ArtifactCheckpoint(open_checkpoint(made.path))
    kinds = {}
    for path, said in found.types.items():
        if said == "16 bits":
            assert path not in artifact.modules
            continue
        scheme = artifact.qtensor(path).scheme
        kinds[path] = (scheme.bits, scheme.group_size)
        assert said == (
            f"{scheme.bits} bits g{scheme.group_size}" if scheme.group_size else f"{scheme.bits} bits by row"
        )
    for index in range(3):
        prefix = f"model.layers.{index}"
        assert len({kinds.get(f"{prefix}.self_attn.{name}_proj") for name in "qkv"}) == 1
        assert kinds.get(f"{prefix}.mlp.gate_proj") == kinds.get(f"{prefix}.mlp.up_proj")
    assert len(set(kinds.values())) > 1

    from transformers import AutoConfig, AutoModelForCausalLM

    ids = torch.randint(0, 512, (1, 32), generator=torch.Generator().manual_seed(0))
    config = AutoConfig.from_pretrained(made.path)
    del config.quantization_config
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dense.load_state_dict({name: artifact.read(name).float() for name in artifact.tensors}, strict=False)
    dense.tie_weights()
    with torch.no_grad():
        expected = dense(ids).logits
        given = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(given, expected, rtol=1e-2, atol=2e-2)


def test_command_writes_the_mixture(tiny_llama: Path, tmp_path: Path) -> None:
    flags = ["--like", "gptq", "--num-samples", "4", "--seq-len", "64", "-o", str(tmp_path / "m"), "--json"]
    done = CliRunner().invoke(app, ["fit", str(tiny_llama), "--format", "compressed-tensors", *flags])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["measured"]["kl"] > 0
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_like_a_preset_and_too_small_a_budget(tiny_llama: Path) -> None:
    found = fit_layers(tiny_llama, like="gptq", calibration=TEXT)
    assert found.nbytes <= size_of(tiny_llama)
    with pytest.raises(RecipeError, match="smallest numbers"):
        fit_layers(tiny_llama, size=10_000, calibration=TEXT)
