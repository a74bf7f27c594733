from __future__ import annotations

import pytest
import torch

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import FormatError
from lowbit.core.scheme import ActivationScheme, Scheme, WeightScheme
from lowbit.formats import format_of
from lowbit.formats.fp8 import FP8
from lowbit.formats.reader import ArtifactCheckpoint

from .reference import read_scaled
from .samples import assert_layout, assert_same, linear_names, load, random_codes, store, tiny_llama

BLOCK = Scheme("fp8", WeightScheme("float", 8, "block", 128), ActivationScheme("float", 8, "group", True, 128))


def random_blocks(name, weight, scheme):
    return random_codes(scheme.weights, *weight.shape, torch.float32, seed=len(name))


@pytest.mark.parametrize("shape", [(130, 256), (128, 200)])
def test_round_trip_agrees_with_a_literal_reader(shape):
    tensor = random_codes(BLOCK.weights, *shape, torch.float32)
    stored = FP8.encode(tensor, BLOCK, torch.bfloat16)
    assert_layout(FP8.layout(BLOCK, shape, torch.bfloat16), stored)
    config = FP8.quantization_config({"model.a": BLOCK}, ["model.b"])
    assert format_of(config) is FP8
    read_back = FP8.schemes(config)("model.a")
    assert read_back == BLOCK
    assert_same(FP8.decode(stored, read_back), tensor)
    dense = read_scaled({"weight": stored["weight"], "weight_scale": stored["weight_scale_inv"]}, 128)
    torch.testing.assert_close(tensor.dequantize(), dense.float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_foreign_scales_in_other_dtypes(dtype):
    tensor = random_codes(BLOCK.weights, 130, 256, torch.float32)
    stored = FP8.encode(tensor, BLOCK, torch.bfloat16)
    foreign = stored | {"weight_scale_inv": stored["weight_scale_inv"].to(dtype)}
    assert torch.equal(FP8.decode(foreign, BLOCK).scale, foreign["weight_scale_inv"].float())


def test_one_scale_for_the_tensor_is_read():
    scheme = FP8.schemes({"quant_method": "fp8", "activation_scheme": "static"})("a")
    assert scheme.activations == ActivationScheme("float", 8, "tensor", False)
    weight = torch.randn(4, 8).to(torch.float8_e4m3fn)
    stored = {"weight": weight, "weight_scale_inv": torch.tensor(0.5), "activation_scale": torch.tensor(2.0)}
    tensor = FP8.decode(stored, scheme)
    assert torch.equal(tensor.dequantize(), weight.float() * 0.5)
    assert tensor.extra["input_scale"].tolist() == [2.0]


def test_transformers_and_our_reader_compute_with_the_dequantized_weights(tmp_path):
    def scheme_of(name):
        return None if "v_proj" in name else BLOCK

    model = store(tmp_path, tiny_llama(torch.bfloat16, 128, 256), FP8, scheme_of, random_blocks)
    loaded = load(tmp_path, torch.bfloat16)
    artifact = ArtifactCheckpoint(open_checkpoint(tmp_path))
    for name in linear_names(model):
        assert torch.equal(artifact.read(f"{name}.weight"), model.get_submodule(name).weight)
        # transformers multiplies in bfloat16, so it rounds the scale too.
        torch.testing.assert_close(
            loaded.get_submodule(name).weight, model.get_submodule(name).weight, rtol=8e-3, atol=0
        )


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("fp8", WeightScheme("float", 8, "channel", 0), ActivationScheme("float")),
        Scheme("fp8", WeightScheme("float", 8, "block", 128)),
        Scheme("fp8", WeightScheme("float", 8, "block", 128), ActivationScheme("float", 8, "group", True, 64)),
        Scheme("w4a16", WeightScheme()),
    ],
)
def test_refusals_name_what_works(scheme):
    assert "fp8_block" in FP8.refuse(scheme)


def test_broken_tensors_are_format_errors():
    stored = FP8.encode(random_codes(BLOCK.weights, 130, 256, torch.float32), BLOCK, torch.bfloat16)
    for broken in ({"weight": stored["weight"]}, stored | {"weight_scale_inv": torch.ones(3, 2)}):
        with pytest.raises(FormatError, match="weight_scale_inv"):
            FP8.decode(broken, BLOCK)
    with pytest.raises(FormatError, match="square"):
        FP8.schemes({"weight_block_size": [1, 128]})
