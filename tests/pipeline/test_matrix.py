"""Every scheme in every format that holds it, on a block of SmolLM2's shapes: quantize, write, read back with readers that
share no code with the formats, compare bit for bit. What a format does not hold is refused before calibration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowbit.api.quantize import quantize
from lowbit.api.run import Settings
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import FormatError, LowbitError, RecipeError
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import Scheme
from lowbit.formats import FORMATS, get_format
from lowbit.formats.reader import ArtifactCheckpoint, open_artifact
from lowbit.recipe import Recipe, preset
from tests.formats.reference import E2M1, read_awq, read_fp4, read_gptq, read_packed, read_scaled
from tests.formats.samples import assert_same

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
STORED = ["gptq", "gptq_v2", "compressed-tensors", "awq", "fp8", "bitsandbytes", "bitsandbytes_double", "modelopt"]
# scheme -> (preset, changes, formats that hold it)
SCHEMES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "w4a16": ("rtn", {"group_size": 64}, {"gptq", "gptq_v2", "compressed-tensors", "awq", "modelopt"}),
    "w4a16 channel": ("rtn", {"group_size": 0}, {"gptq", "gptq_v2", "compressed-tensors", "awq"}),
    "w4a16 asym": ("rtn", {"group_size": 64, "symmetric": False}, {"gptq_v2", "compressed-tensors", "awq"}),
    "w4a16 gptq": ("gptq", {"group_size": 64}, {"gptq", "gptq_v2", "compressed-tensors", "awq", "modelopt"}),
    "w4a16 awq": ("awq", {"group_size": 64}, {"gptq_v2", "compressed-tensors", "awq"}),
    "w4a16 awq sym": (
        "awq",
        {"group_size": 64, "symmetric": True},
        {"gptq", "gptq_v2", "compressed-tensors", "awq", "modelopt"},
    ),
    "w4a16 awq gptq": (
        "gptq",
        {"group_size": 64, "transforms": ["awq"]},
        {"gptq", "gptq_v2", "compressed-tensors", "awq", "modelopt"},
    ),
    "w8a16": ("int8", {}, {"gptq", "gptq_v2", "compressed-tensors"}),
    "w3a16": ("rtn", {"bits": 3, "group_size": 64}, {"gptq", "gptq_v2", "compressed-tensors"}),
    "w8a8": ("w8a8", {}, {"compressed-tensors"}),
    "w8a8 static": ("w8a8", {"activations": "int8_static"}, {"compressed-tensors"}),
    "w8a8 smoothquant": ("int8_sq", {}, {"compressed-tensors"}),
    "fp8 channel": ("fp8", {}, {"compressed-tensors", "modelopt"}),
    "fp8 tensor static": ("fp8_static", {}, {"compressed-tensors", "modelopt"}),
    "fp8 block": ("fp8_block", {"group_size": 64}, {"compressed-tensors", "fp8"}),
    "nf4": ("nf4", {}, {"bitsandbytes", "bitsandbytes_double"}),
    "fp4": ("fp4", {}, {"bitsandbytes", "bitsandbytes_double"}),
    "llm_int8": ("llm_int8", {}, {"bitsandbytes", "compressed-tensors"}),
    "mxfp4": ("mxfp4", {}, {"compressed-tensors"}),
    "nvfp4": ("nvfp4", {}, {"compressed-tensors", "modelopt"}),
    "mxfp4 gptq": ("gptq", {"kind": "mxfp4"}, {"compressed-tensors"}),
    "nvfp4 gptq": ("gptq", {"kind": "nvfp4"}, {"compressed-tensors", "modelopt"}),
    "fp8 learned": (
        "autoround",
        {"kind": "float", "options": {"steps": 2}},
        {"compressed-tensors"},
    ),
    "nvfp4 a4": ("nvfp4_a4", {}, {"compressed-tensors", "modelopt"}),
}
CASES = [(name, fmt) for name, (_, _, formats) in SCHEMES.items() for fmt in sorted(formats)]
REFUSED = [(name, fmt) for name, (_, _, formats) in SCHEMES.items() for fmt in STORED if fmt not in formats]
LAYER = "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def block(make_model: Callable[..., Path]) -> Path:
    return make_model(**SMOLLM2)


def recipe_of(name: str, fmt: str) -> Recipe:
    base, changes, _ = SCHEMES[name]
    return preset(base).updated(**changes, format=fmt, dataset="pydoc", num_samples=4, seq_len=32)


@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_what_is_stored_is_what_was_chosen(
    block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fmt: str
) -> None:
    if SCHEMES[name][0] in ("nf4", "fp4", "llm_int8"):
        pytest.importorskip("bitsandbytes")
    chosen: list[tuple[QTensor, Scheme]] = []
    kind = type(get_format(fmt))
    encode = kind.encode

    def recorded(self: Any, tensor: QTensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
        chosen.append((tensor, scheme))
        return encode(self, tensor, scheme, dtype)

    monkeypatch.setattr(kind, "encode", recorded)
    result = quantize(block, output=tmp_path / "out", recipe=recipe_of(name, fmt), settings=Settings(verify=False))
    back = open_artifact(open_checkpoint(result.path))
    assert isinstance(back, ArtifactCheckpoint)
    assert len(back.modules) == len(chosen) == 7
    by_name = dict(zip(result.record["layers"], chosen, strict=True))
    tensor, scheme = by_name[LAYER]
    if not (fmt == "awq" and scheme.weights is not None and scheme.weights.symmetric) and fmt != "modelopt":
        for path in back.modules:
            if path in by_name and not (scheme.weights and scheme.weights.kind == "nvfp4"):
                assert_same(back.qtensor(path), by_name[path][0])
    stored = load_file(result.path / "model.safetensors")
    layer = {key.removeprefix(f"{LAYER}."): value for key, value in stored.items() if key.startswith(f"{LAYER}.")}
    config = json.loads((result.path / "config.json").read_text())["quantization_config"]
    expected = read(layer, fmt, config, scheme)
    torch.testing.assert_close(tensor.dequantize(torch.float64), expected, rtol=1e-6, atol=1e-12)
    assert ("input_scale" in layer) == ("static" in name or (name == "nvfp4 a4" and fmt == "modelopt"))


def read(layer: dict[str, Tensor], fmt: str, config: dict[str, Any], scheme: Scheme) -> Tensor:
    """Dense float64 weights from the stored tensors alone."""
    weights = scheme.weights
    assert weights is not None
    if fmt in ("gptq", "gptq_v2"):
        return read_gptq(layer, config)
    if fmt == "awq":
        return read_awq(layer, config)
    if fmt.startswith("bitsandbytes"):
        return read_bitsandbytes(layer, weights.kind)
    if fmt == "fp8":
        return read_scaled({"weight": layer["weight"], "weight_scale": layer["weight_scale_inv"]}, weights.group_size)
    if fmt == "modelopt":
        return read_modelopt(layer, weights.kind, weights.group_size)
    if "weight_packed" in layer and weights.kind == "int":
        return read_packed(layer, config["config_groups"]["group_0"]["weights"])
    if "weight_packed" in layer:
        return read_fp4(layer, weights.group_size)
    return read_scaled(layer, weights.group_size or None)


def read_bitsandbytes(layer: dict[str, Tensor], kind: str) -> Tensor:
    if kind == "int":
        return layer["weight"].double() * layer["SCB"].double()[:, None] / 127
    state = json.loads(bytes(layer[f"weight.quant_state.bitsandbytes__{kind}"].tolist()))
    largest = layer["weight.absmax"]
    if "weight.nested_absmax" in layer:
        nested = layer["weight.nested_quant_map"].double()[largest.long()].view(-1)
        spread = layer["weight.nested_absmax"].double().repeat_interleave(256)[: len(nested)]
        largest = nested * spread + state["nested_offset"]
    book = layer["weight.quant_map"].tolist()
    values = [book[nibble] for byte in layer["weight"].flatten().tolist() for nibble in (byte >> 4, byte & 15)]
    blocks = torch.tensor(values, dtype=torch.float64).view(-1, state["blocksize"])
    return (blocks * largest.double()[:, None]).view(state["shape"])


def read_modelopt(layer: dict[str, Tensor], kind: str, group: int) -> Tensor:
    scale = layer["weight_scale"].double()
    if kind == "float":
        return layer["weight"].double() * (scale if scale.dim() == 0 else scale[:, None])
    if kind == "nvfp4":
        values = [[E2M1[n] for byte in row for n in (byte & 15, byte >> 4)] for row in layer["weight"].tolist()]
        scale = scale * layer["weight_scale_2"].double()
        return torch.tensor(values, dtype=torch.float64) * scale.repeat_interleave(group, 1)
    signed = [(n ^ 8) - 8 for row in layer["weight"].T.tolist() for byte in row for n in (byte & 15, byte >> 4)]
    codes = torch.tensor(signed, dtype=torch.float64).view(layer["weight"].shape[1], -1).T
    return codes * scale.repeat_interleave(group, 1) * layer["pre_quant_scale"].double()


@pytest.mark.parametrize(("name", "fmt"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_before_calibration(
    block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fmt: str
) -> None:
    def no_calibration(*_: Any) -> Tensor:
        raise AssertionError("calibration text was read")

    monkeypatch.setattr("lowbit.api.calibration.token_windows", no_calibration)
    with pytest.raises(FormatError) as refused:
        quantize(block, output=tmp_path / "out", recipe=recipe_of(name, fmt))
    assert fmt.partition("_")[0] in refused.value.message or "use" in refused.value.message
    holding = SCHEMES[name][2]
    assert refused.value.hint is not None
    assert any(name in refused.value.hint for name in holding)
    assert not list(tmp_path.iterdir())


def test_int8_smoothquant_for_tensorrt_llm_says_what_works_today(block: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"TensorRT-LLM no longer serves.*vLLM.*fp8"):
        quantize(block, output=tmp_path / "out", recipe=recipe_of("w8a8 smoothquant", "modelopt"))


def test_true_act_order_is_refused_where_it_cannot_be_loaded(block: Path, tmp_path: Path) -> None:
    recipe = recipe_of("w4a16 gptq", "compressed-tensors").updated(options={"act_order": "desc"})
    with pytest.raises(FormatError, match="static act-order"):
        quantize(block, output=tmp_path / "out", recipe=recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "gptq", "kind": "float", "group_size": 0},
            "method 'gptq' chooses int, mxfp4, nvfp4 numbers, not float",
        ),
        (
            {"method": "gptq", "kind": "nvfp4", "group_size": "auto", "options": {"act_order": "desc"}},
            "groups of nvfp4 stay where they are",
        ),
        ({"method": "fp8", "kind": "int"}, "method 'fp8' chooses float numbers, not int"),
        ({"method": "fp4", "kind": "nvfp4", "group_size": 32}, "nvfp4 has groups of 16, not 32"),
        ({"method": "rtn", "bits": 12}, "12 bit integers"),
        ({"method": "fp8", "kind": "float", "group_size": 0, "symmetric": False}, "no zero points"),
        ({"method": "rtn", "granularity": "tensor"}, "by group or channel, not by tensor"),
        ({"method": "rtn", "group_size": 100}, "does not divide the 576 inputs"),
        ({"transforms": ["awk"]}, "did you mean 'awq'"),
        ({"transforms": {"awq": {"gird": 3}}}, "did you mean 'grid'"),
    ],
)
def test_contradictions_are_refused_with_what_would_do(
    block: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        quantize(block, output=tmp_path / "out", recipe=Recipe.parse(changes))
    assert message in refused.value.message
    assert refused.value.hint


def test_a_transform_needs_a_known_architecture(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("stablelm")
    with pytest.raises(LowbitError, match="table of architectures"):
        quantize(model, output=tmp_path / "out", recipe=preset("awq").updated(group_size=32, dataset="pydoc"))


def test_every_format_is_in_the_matrix() -> None:
    assert set(STORED) <= set(FORMATS.names())
