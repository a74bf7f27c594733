from __future__ import annotations

import pytest
import torch

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import FormatError
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import ActivationScheme, Scheme, WeightScheme
from lowbit.formats import format_of
from lowbit.formats.compressed_tensors import COMPRESSED_TENSORS
from lowbit.formats.modelopt import MODELOPT
from lowbit.formats.reader import ArtifactCheckpoint

from .reference import E2M1
from .samples import assert_layout, assert_same, linear_names, random_codes, store, tiny_llama

FP8 = Scheme("fp8", WeightScheme("float", 8, "tensor", 0), ActivationScheme("float", 8, "tensor", False))
FP8_CHANNEL = Scheme("fp8", WeightScheme("float", 8, "channel", 0), ActivationScheme("float", 8, "token"))
AWQ = Scheme("w4a16", WeightScheme(group_size=32))
NVFP4 = Scheme("nvfp4", WeightScheme("nvfp4", 4, "group", 16), ActivationScheme("nvfp4", 4, "group", True, 16))
NVFP4_ONLY = Scheme("nvfp4a16", WeightScheme("nvfp4", 4, "group", 16))
ALGORITHMS = {
    "FP8": FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": FP8_CHANNEL,
    "W4A16_AWQ": AWQ,
    "NVFP4": NVFP4,
    "W4A16_NVFP4": NVFP4_ONLY,
}


def sample(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> QTensor:
    tensor = random_codes(scheme.weights, rows, columns, torch.float32, seed)
    scale, extra = tensor.scale, {}
    if scheme.weights.kind == "nvfp4":
        scale, extra = (scale * 2000).to(torch.float8_e4m3fn), {"weight_scale_2": torch.tensor([0.00123])}
    if scheme in (FP8, NVFP4):
        extra["input_scale"] = torch.tensor([0.0321])
    if scheme is AWQ:
        factor = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) + 0.5
        extra["pre_quant_scale"] = factor.to(torch.bfloat16)
    return QTensor(tensor.codes, scale, scheme.weights, extra=extra or None)


def read_literally(stored: dict[str, torch.Tensor], algorithm: str) -> torch.Tensor:
    """Dense float64 [out, in], byte by byte."""
    weight, scale = stored["weight"], stored["weight_scale"].double()
    if algorithm.startswith("FP8"):
        return weight.double() * (scale if scale.dim() == 0 else scale[:, None])
    rows = []
    for row, line in enumerate(weight.tolist()):
        if algorithm == "W4A16_AWQ":
            for output, shift in ((2 * row, 0), (2 * row + 1, 4)):
                nibbles = [(byte >> shift) & 15 for byte in line]
                signed = [nibble - 16 if nibble > 7 else nibble for nibble in nibbles]
                group = len(line) // scale.shape[1]
                rows.append([code * float(scale[output, c // group]) for c, code in enumerate(signed)])
        else:
            values = [E2M1[nibble] for byte in line for nibble in (byte & 15, byte >> 4)]
            outer = float(stored["weight_scale_2"])
            rows.append([value * float(scale[row, c // 16]) * outer for c, value in enumerate(values)])
    dense = torch.tensor(rows, dtype=torch.float64)
    return dense * stored["pre_quant_scale"].double() if algorithm == "W4A16_AWQ" else dense


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_round_trip_agrees_with_a_literal_reader(algorithm):
    scheme = ALGORITHMS[algorithm]
    tensor = sample(scheme, 48, 96)
    stored = MODELOPT.encode(tensor, scheme, torch.bfloat16)
    assert_layout(MODELOPT.layout(scheme, (48, 96), torch.bfloat16), stored)
    config = MODELOPT.quantization_config({"model.a": scheme}, ["model.b"])
    assert format_of(config) is MODELOPT
    assert MODELOPT.schemes(config)("lm_head") is MODELOPT.schemes(config)("model.b") is None
    read_back = MODELOPT.schemes(config)("model.a")
    assert (read_back.weights, read_back.activations) == (scheme.weights, scheme.activations)
    assert_same(MODELOPT.decode(stored, read_back), tensor)
    torch.testing.assert_close(tensor.dequantize(), read_literally(stored, algorithm).float(), rtol=4e-7, atol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_files_are_in_modelopts_words(algorithm):
    config = MODELOPT.quantization_config({"model.a": ALGORITHMS[algorithm]}, ["model.b"], kv_cache="fp8")
    files = MODELOPT.files(config)["hf_quant_config.json"]
    assert set(files) == {"producer", "quantization"}
    expected = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": ["model.b", "lm_head"]}
    expected |= {"NVFP4": {"group_size": 16}, "W4A16_NVFP4": {"group_size": 16}}.get(algorithm, {})
    if algorithm == "W4A16_AWQ":
        expected |= {"group_size": 32, "has_zero_point": False, "pre_quant_scale": True}
    assert files["quantization"] == expected
    if algorithm == "FP8":
        numbers = {"dynamic": False, "num_bits": 8, "type": "float"}
        group = {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
        assert config["config_groups"] == {"group_0": group}
        assert config["kv_cache_scheme"] == numbers


def test_a_layer_without_pre_quant_scale_gets_ones_and_loses_them_again():
    tensor = random_codes(AWQ.weights, 16, 64, torch.float32)
    stored = MODELOPT.encode(tensor, AWQ, torch.float16)
    assert stored["pre_quant_scale"].tolist() == [1.0] * 64
    assert_same(MODELOPT.decode(stored, AWQ), tensor)


def test_group_size_comes_from_the_stored_scales():
    tensor = sample(AWQ, 16, 64)
    stored = MODELOPT.encode(tensor, AWQ, torch.bfloat16)
    silent = MODELOPT.schemes({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "ignore": ["lm_head*"]})
    assert silent("lm_head.x") is None
    assert torch.equal(MODELOPT.decode(stored, silent("model.a")).dequantize(), tensor.dequantize())


def test_nvfp4_goes_over_to_compressed_tensors_and_back():
    tensor = sample(NVFP4, 16, 64)
    there = COMPRESSED_TENSORS.decode(COMPRESSED_TENSORS.encode(tensor, NVFP4, torch.bfloat16), NVFP4)
    torch.testing.assert_close(there.dequantize(), tensor.dequantize(), rtol=4e-7, atol=0)
    back = MODELOPT.decode(MODELOPT.encode(there, NVFP4, torch.bfloat16), NVFP4)
    torch.testing.assert_close(back.dequantize(), tensor.dequantize(), rtol=4e-7, atol=0)
    assert torch.equal(back.codes, tensor.codes)


@pytest.mark.parametrize("scheme", ALGORITHMS.values(), ids=ALGORITHMS)
def test_the_reader_gives_what_was_stored(tmp_path, scheme):
    model = store(
        tmp_path, tiny_llama(torch.bfloat16), MODELOPT, lambda name: scheme, lambda name, w, s: sample(s, *w.shape)
    )
    artifact = ArtifactCheckpoint(open_checkpoint(tmp_path))
    assert set(artifact.tensors) == set(model.state_dict())
    for name in linear_names(model):
        assert artifact.tensors[f"{name}.weight"].shape == tuple(model.get_submodule(name).weight.shape)
        assert torch.equal(artifact.read(f"{name}.weight"), model.get_submodule(name).weight)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme("w8a8", WeightScheme("int", 8, "channel", 0), ActivationScheme()), "compressed-tensors' on vLLM"),
        (Scheme("w4a16", WeightScheme(symmetric=False)), "symmetric"),
        (Scheme("fp8", WeightScheme("float", 8, "block", 128)), "fp8"),
        (Scheme("w16a16", None), "w4a16"),
    ],
)
def test_refusals_say_what_works_today(scheme, reason):
    assert reason in MODELOPT.refuse(scheme)


def test_missing_calibration_and_unknown_algorithms_are_format_errors():
    tensor = sample(FP8, 8, 16)
    with pytest.raises(FormatError, match="input_scale"):
        MODELOPT.encode(QTensor(tensor.codes, tensor.scale, tensor.scheme), FP8, torch.bfloat16)
    with pytest.raises(FormatError, match="MIXED_PRECISION"):
        MODELOPT.schemes({"quant_algo": "MIXED_PRECISION"})
    with pytest.raises(FormatError, match="KV cache"):
        MODELOPT.quantization_config({"a": FP8}, [], kv_cache="int4")
    stored = MODELOPT.encode(sample(NVFP4, 8, 32), NVFP4, torch.bfloat16)
    with pytest.raises(FormatError, match="weight_scale_2"):
        MODELOPT.decode({name: part for name, part in stored.items() if name != "weight_scale_2"}, NVFP4)
