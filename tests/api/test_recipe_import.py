"""Recipes of other tools, as those tools write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit.api.recipe_import import import_recipe
from lowbit.core.errors import RecipeError


def imported(tmp_path: Path, content: dict[str, Any] | str, name: str = "recipe.json") -> Any:
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return import_recipe(file)


def test_autogptq(tmp_path: Path) -> None:
    found = imported(
        tmp_path,
        {"bits": 3, "group_size": -1, "damp_percent": 0.1, "desc_act": True, "static_groups": False, "sym": True,
         "true_sequential": True, "model_name_or_path": None, "is_marlin_format": False},
        "quantize_config.json",
    )  # fmt: skip
    recipe = found.recipe
    assert (recipe.method, recipe.bits, recipe.group_size, recipe.symmetric) == ("gptq", 3, 0, True)
    assert (recipe.format, recipe.options["percdamp"], recipe.options["act_order"]) == ("gptq", 0.1, "static")
    assert any("desc_act" in note for note in found.notes)
    assert any("is_marlin_format" in note for note in found.notes)
    assert len(found.notes) == 2


def test_autogptq_without_symmetry_goes_to_v2(tmp_path: Path) -> None:
    assert imported(tmp_path, {"bits": 4, "group_size": 128, "sym": False}).recipe.format == "gptq_v2"


@pytest.mark.parametrize(
    "content",
    [
        {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}},
    ],
)
def test_autoawq(tmp_path: Path, content: dict[str, Any]) -> None:
    found = imported(tmp_path, content)
    recipe = found.recipe
    assert (recipe.bits, recipe.group_size, recipe.symmetric, recipe.format) == (4, 64, False, "awq")
    assert list(recipe.transforms) == ["awq"]
    assert found.notes == []


def test_autoawq_gemv_is_told(tmp_path: Path) -> None:
    content = {"zero_point": False, "w_bit": 4, "version": "GEMV", "modules_to_not_convert": ["gate"]}
    found = imported(tmp_path, content)
    assert found.recipe.symmetric
    assert found.recipe.ignores("model.layers.0.mlp.gate")
    assert any("gemm" in note for note in found.notes)


LLMCOMPRESSOR = """
quant_stage:
  quant_modifiers:
    SmoothQuantModifier:
      smoothing_strength: 0.8
      mappings: [[["re:.*q_proj"], "re:.*input_layernorm"]]
    GPTQModifier:
      ignore: [lm_head]
      scheme: W8A8
      targets: Linear
      dampening_frac: 0.05
      offload_hessians: true
    SparseGPTModifier: {sparsity: 0.5}
"""


def test_llmcompressor(tmp_path: Path) -> None:
    found = imported(tmp_path, LLMCOMPRESSOR, "recipe.yaml")
    recipe = found.recipe
    assert (recipe.method, recipe.bits, recipe.activations, recipe.group_size) == ("gptq", 8, "int8", 0)
    assert recipe.transforms == {"smoothquant": {"alpha": 0.8}}
    assert recipe.options["percdamp"] == 0.05
    assert recipe.format == "compressed-tensors"
    told = " ".join(found.notes)
    assert all(name in told for name in ("offload_hessians", "SparseGPTModifier", "mappings"))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("W4A16", ("rtn", "int", 4, 128, "none")),
        ("FP8_DYNAMIC", ("fp8", "float", 8, 0, "fp8")),
        ("FP8", ("fp8", "float", 8, 0, "fp8_static")),
        ("NVFP4", ("fp4", "nvfp4", 4, 16, "nvfp4")),
        ("MXFP4A16", ("fp4", "mxfp4", 4, 32, "none")),
    ],
)
def test_schemes_of_llmcompressor(tmp_path: Path, scheme: str, expected: tuple[Any, ...]) -> None:
    text = f"DEFAULT_stage:\n  DEFAULT_modifiers:\n    QuantizationModifier: {{scheme: {scheme}, targets: [Linear]}}\n"
    recipe = imported(tmp_path, text, "recipe.yaml").recipe
    assert (recipe.method, recipe.kind, recipe.bits, recipe.group_size, recipe.activations) == expected


def test_config_groups_and_awq_of_llmcompressor(tmp_path: Path) -> None:
    text = """
DEFAULT_stage:
  DEFAULT_modifiers:
    AWQModifier:
      duo_scaling: both
      config_groups:
        group_0: {targets: [Linear], weights: {num_bits: 4, type: int, symmetric: false, group_size: 64, strategy: group}}
      ignore: [lm_head, "re:.*gate"]
"""
    recipe = imported(tmp_path, text, "recipe.yaml").recipe
    assert (recipe.method, recipe.bits, recipe.group_size, recipe.symmetric) == ("rtn", 4, 64, False)
    assert recipe.transforms["awq"] == {"duo": "both", "grid": 20}
    assert recipe.ignores("model.layers.0.mlp.gate")


def test_modelopt_names() -> None:
    found = import_recipe("int4_awq").recipe
    assert (found.format, found.symmetric, list(found.transforms)) == ("modelopt", True, ["awq"])
    smooth = import_recipe("int8_sq")
    assert smooth.recipe.format == "compressed-tensors"
    assert "TensorRT-LLM" in smooth.notes[0]


@pytest.mark.parametrize("content", ["[1, 2]", "{not json", '{"what": 1}'])
def test_what_is_no_recipe_is_said(tmp_path: Path, content: str) -> None:
    with pytest.raises(RecipeError):
        imported(tmp_path, content)


def test_unknown_names_come_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="did you mean 'int4_awq'"):
        import_recipe("int4_aqw")
