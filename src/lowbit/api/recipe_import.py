"""Recipes of other tools -> ours: AutoGPTQ and GPTQModel, AutoAWQ, llm-compressor, ModelOpt.

What a foreign recipe says and lowbit has no counterpart for is told, never dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lowbit.core.errors import RecipeError, did_you_mean
from lowbit.recipe import Recipe, preset

# ModelOpt's names of formats (examples/hf_ptq, --qformat) -> changes to a preset
_QFORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("fp8_static", {"format": "modelopt"}),
    "fp8_pc_pt": ("fp8", {"format": "modelopt"}),
    "fp8_pb_wo": ("fp8_block", {"format": "compressed-tensors", "activations": "none"}),
    "int8": ("w8a8", {}),
    "int8_wo": ("int8", {}),
    "int8_sq": ("int8_sq", {"format": "compressed-tensors"}),
    "int4_awq": ("awq", {"symmetric": True, "format": "modelopt"}),
    "nvfp4": ("nvfp4_a4", {"format": "modelopt"}),
    "w4a16_nvfp4": ("nvfp4", {"format": "modelopt"}),
    "mxfp4": ("mxfp4", {}),
}
_QFORMAT_NOTES = {
    "int8_sq": "TensorRT-LLM serves int8 SmoothQuant no longer: this recipe is for vLLM; fp8 is for TensorRT-LLM",
    "int8": "ModelOpt's int8 has static activations; these are scaled per token, set activations: int8_static for its own",
}


@dataclass
class Imported:
    """Our recipe, the tool it came from, and what of the foreign one was lost or changed."""

    recipe: Recipe
    tool: str
    notes: list[str] = field(default_factory=list)


def import_recipe(source: str | Path) -> Imported:
    """Read a file of another tool, or take a name of ModelOpt's qformats. Raises RecipeError when it is none of these."""
    file = Path(source)
    if not file.is_file():
        if str(source) in _QFORMATS:
            return _modelopt(str(source))
        raise RecipeError(
            f"{source} is neither a file nor a ModelOpt qformat{did_you_mean(str(source), _QFORMATS)}",
            hint=f"qformats are {', '.join(_QFORMATS)}",
        )
    content = _read(file)
    for fits, convert in _READERS:
        if fits(content):
            return convert(content)
    raise RecipeError(
        f"{file} is no recipe that lowbit knows",
        hint="AutoGPTQ's quantize_config.json, AutoAWQ's quant_config, llm-compressor's recipe.yaml or a ModelOpt qformat",
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text()) if file.suffix == ".json" else yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file} holds no mapping")
    inner = content.get("quantization_config") or content.get("quant_config")
    return dict(inner) if isinstance(inner, dict) else content


def _gptq(content: Mapping[str, Any]) -> Imported:
    """AutoGPTQ and GPTQModel: quantize_config.json."""
    imported = Imported(preset("gptq"), "AutoGPTQ")
    options: dict[str, Any] = {"act_order": "static"}
    if content.get("desc_act"):
        imported.notes.append(
            "desc_act: replaced by the static act-order, since vLLM refuses reordered groups; "
            "--act-order desc brings them back"
        )
    if "damp_percent" in content:
        options["percdamp"] = float(content["damp_percent"])
    symmetric = bool(content.get("sym", True))
    stored = content.get("checkpoint_format") or ("gptq" if symmetric else "gptq_v2")
    if not symmetric and stored == "gptq":
        stored = "gptq_v2"
        imported.notes.append("checkpoint_format gptq cannot hold every zero point: gptq_v2 instead")
    known = {"bits", "group_size", "desc_act", "sym", "damp_percent", "checkpoint_format", "quant_method", "lm_head",
             "static_groups", "true_sequential", "model_name_or_path", "model_file_base_name", "meta"}  # fmt: skip
    _note_rest(imported, content, known)
    if content.get("lm_head"):
        imported.notes.append("lm_head: set `ignore: []` to quantize the head")
    imported.recipe = imported.recipe.updated(
        bits=content.get("bits"),
        group_size=_group_size(content.get("group_size")),
        symmetric=symmetric,
        format=stored,
        options=options,
        sequential=bool(content.get("true_sequential", True)),
    )
    return imported


def _awq(content: Mapping[str, Any]) -> Imported:
    """AutoAWQ: quant_config, with its Python names or those of config.json."""
    imported = Imported(preset("awq"), "AutoAWQ")
    version = str(content.get("version", "gemm")).lower()
    if version != "gemm":
        imported.notes.append(f"version {content['version']}: lowbit writes gemm, which every runtime reads")
    skipped = content.get("modules_to_not_convert") or []
    known = {"w_bit", "bits", "q_group_size", "group_size", "zero_point", "version", "modules_to_not_convert",
             "quant_method"}  # fmt: skip
    _note_rest(imported, content, known)
    imported.recipe = imported.recipe.updated(
        bits=content.get("w_bit", content.get("bits")),
        group_size=_group_size(content.get("q_group_size", content.get("group_size"))),
        symmetric=not content.get("zero_point", True),
        ignore=("lm_head", *(f"*{name}*" for name in skipped if name != "lm_head")),
    )
    return imported


def _modelopt(name: str) -> Imported:
    base, changes = _QFORMATS[name]
    notes = [_QFORMAT_NOTES[name]] if name in _QFORMAT_NOTES else []
    return Imported(preset(base).updated(**changes), "ModelOpt", notes)


# llm-compressor's preset schemes -> our presets
_SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A16": ("rtn", {}),
    "W4A16_ASYM": ("rtn", {"symmetric": False}),
    "W8A16": ("int8", {}),
    "W8A8": ("w8a8", {}),
    "INT8": ("w8a8", {}),
    "FP8": ("fp8_static", {}),
    "FP8_DYNAMIC": ("fp8", {}),
    "FP8_BLOCK": ("fp8_block", {"format": "compressed-tensors"}),
    "NVFP4A16": ("nvfp4", {}),
    "NVFP4": ("nvfp4_a4", {}),
    "MXFP4A16": ("mxfp4", {}),
    "MXFP4": ("mxfp4", {"activations": "mxfp4"}),
}


def _llmcompressor(content: Mapping[str, Any]) -> Imported:
    """llm-compressor: stages of modifiers in order. SmoothQuant and AWQ become transforms, GPTQ or plain quantization
    the method."""
    imported = Imported(preset("rtn"), "llm-compressor")
    transforms: dict[str, dict[str, Any]] = {}
    for name, modifier in _modifiers(content):
        if name == "SmoothQuantModifier":
            transforms["smoothquant"] = {"alpha": float(modifier.pop("smoothing_strength", 0.5))}
        elif name == "AWQModifier":
            duo = {True: "yes", False: "no"}.get(modifier.pop("duo_scaling", True), "both")
            transforms["awq"] = {"duo": duo, "grid": int(modifier.pop("n_grid", 20))}
        elif name not in ("GPTQModifier", "QuantizationModifier"):
            imported.notes.append(f"{name}: lowbit has no counterpart")
            continue
        if "mappings" in modifier and modifier.pop("mappings"):
            imported.notes.append(f"{name}.mappings: lowbit takes them from its table of architectures")
        if "scheme" in modifier or "config_groups" in modifier:
            _apply_scheme(imported, name, modifier)
        imported.notes += [f"{name}.{key}: lowbit has no counterpart" for key in modifier]
    imported.recipe = imported.recipe.updated(transforms=transforms)
    return imported


def _apply_scheme(imported: Imported, name: str, modifier: dict[str, Any]) -> None:
    scheme = modifier.pop("scheme", None)
    groups = modifier.pop("config_groups", None)
    if groups:
        recipe = _from_groups(imported, groups)
    elif str(scheme).upper() in _SCHEMES:
        base, changes = _SCHEMES[str(scheme).upper()]
        recipe = preset(base).updated(**changes)
    else:
        raise RecipeError(
            f"llm-compressor's scheme {scheme!r} has no counterpart{did_you_mean(str(scheme), _SCHEMES)}",
            hint=f"known are {', '.join(_SCHEMES)}",
        )
    targets = modifier.pop("targets", "Linear")
    if targets not in ("Linear", ["Linear"]):
        imported.notes.append(
            f"{name}.targets {targets}: lowbit quantizes every linear layer that `ignore` does not name"
        )
    ignored = tuple(modifier.pop("ignore", ["lm_head"]))
    if name == "GPTQModifier":
        recipe = _with_gptq(imported, recipe, modifier)
    imported.recipe = recipe.updated(ignore=ignored)


def _with_gptq(imported: Imported, recipe: Recipe, modifier: dict[str, Any]) -> Recipe:
    order = {"static": "static", "group": "desc", "weight": "static"}.get(
        str(modifier.pop("actorder", "static")), "none"
    )
    damp = float(modifier.pop("dampening_frac", 0.01))
    modifier.pop("block_size", None)  # how many columns are updated at once: the result is the same
    if recipe.kind != "int":
        imported.notes.append(f"GPTQModifier: lowbit's gptq rounds integers, {recipe.kind} is rounded to nearest")
        return recipe
    options = {**preset("gptq").options, "act_order": order, "percdamp": damp}
    return Recipe.parse({**recipe.model_dump(), "method": "gptq", "options": options})


def _from_groups(imported: Imported, groups: Mapping[str, Any]) -> Recipe:
    first, *others = groups.values()
    if others:
        imported.notes.append("config_groups: only the first was taken; write the others as `overrides`")
    weights, inputs = first.get("weights") or {}, first.get("input_activations")
    if str(weights.get("type", "int")) == "float":
        base = "fp8" if int(weights.get("num_bits", 8)) == 8 else "nvfp4_a4" if inputs else "nvfp4"
        static = inputs is not None and not inputs.get("dynamic", False) and base == "fp8"
        return preset("fp8_static" if static else base).updated(activations="none" if inputs is None else None)
    group_size = weights.get("group_size") or 0
    return preset("rtn").updated(
        bits=weights.get("num_bits"),
        group_size=_group_size(group_size),
        symmetric=bool(weights.get("symmetric", True)),
        activations="none" if inputs is None else "int8" if inputs.get("dynamic", False) else "int8_static",
    )


def _modifiers(content: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Modifiers of all stages in order, each a copy. Newer recipes have no stages."""
    found: list[tuple[str, dict[str, Any]]] = []
    for key, value in content.items():
        if key.endswith("Modifier"):
            found.append((key, dict(value or {})))
        elif isinstance(value, Mapping):
            found += _modifiers(value)
    return found


def _group_size(value: Any) -> int | None:
    return None if value is None else max(int(value), 0)


def _note_rest(imported: Imported, content: Mapping[str, Any], known: set[str]) -> None:
    imported.notes += [f"{name}: lowbit has no counterpart" for name in content if name not in known]


_Reader = tuple[Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any]], Imported]]
_READERS: list[_Reader] = [
    (lambda content: bool(_modifiers(content)), _llmcompressor),
    (lambda content: content.get("quant_method") == "awq" or "w_bit" in content or "zero_point" in content, _awq),
    (lambda content: content.get("quant_method") in (None, "gptq") and "bits" in content, _gptq),
    (lambda content: str(content.get("qformat", "")) in _QFORMATS, lambda content: _modelopt(str(content["qformat"]))),
]
