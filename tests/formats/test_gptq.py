from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.core.errors import FormatError
from lowbit.core.scheme import ActivationScheme, Scheme, WeightScheme
from lowbit.formats import format_of
from lowbit.formats.gptq import GPTQ, GPTQ_V2

from .reference import read_gptq
from .samples import assert_layout, assert_same, random_codes

schemes = st.builds(
    lambda bits, group, symmetric, reordered: WeightScheme(
        bits=bits, symmetric=symmetric, reordered=reordered and group > 0
    ).with_group_size(group),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([0, 16, 32]),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(weights=schemes, version=st.sampled_from([GPTQ, GPTQ_V2]), seed=st.integers(0, 1000))
def test_round_trip_agrees_with_a_literal_reader(weights, version, seed):
    scheme = Scheme("any", weights)
    if version.refuse(scheme):
        assert version is GPTQ
        assert not weights.symmetric
        return
    tensor = random_codes(weights, 32, 64, torch.float16, seed)
    stored = version.encode(tensor, scheme, torch.bfloat16)
    assert_layout(version.layout(scheme, (32, 64), torch.bfloat16), stored)
    config = version.quantization_config({"model.layers.0.mlp.up_proj": scheme}, ["lm_head"])
    read_back = format_of(config).schemes(config)("model.layers.0.mlp.up_proj")
    assert read_back.weights == weights
    assert_same(version.decode(stored, read_back), tensor)
    assert torch.equal(read_gptq(stored, config), tensor.dequantize(torch.float64))


def test_version_1_of_four_symmetric_bits_is_autogptqs_constant():
    scheme = Scheme("w4a16", WeightScheme(group_size=32))
    tensor = random_codes(scheme.weights, 8, 64, torch.float16)
    stored = GPTQ.encode(tensor, scheme, torch.float16)
    assert stored["qzeros"].tolist() == [[0x77777777], [0x77777777]]
    stored = GPTQ_V2.encode(tensor, scheme, torch.float16)
    assert [word & 0xFFFFFFFF for word in stored["qzeros"].flatten().tolist()] == [0x88888888] * 2
    assert stored["g_idx"].tolist() == [0] * 32 + [1] * 32


def test_foreign_version_1_asymmetric_zero_points_wrap():
    scheme = Scheme("w4a16", WeightScheme(group_size=32, symmetric=False))
    tensor = random_codes(scheme.weights, 8, 64, torch.float16)
    stored = GPTQ_V2.encode(tensor, scheme, torch.float16)
    decoded = GPTQ.decode(stored, scheme)
    assert decoded.zero.tolist() == [[(zero + 1) % 16 for zero in row] for row in tensor.zero.tolist()]


def test_symmetric_checkpoint_with_version_2_zeros_under_version_1s_name():
    scheme = Scheme("w4a16", WeightScheme(group_size=32))
    tensor = random_codes(scheme.weights, 8, 64, torch.float16)
    assert_same(GPTQ.decode(GPTQ_V2.encode(tensor, scheme, torch.float16), scheme), tensor)


def test_stray_zero_point_of_a_symmetric_checkpoint_is_an_error():
    asymmetric = Scheme("w4a16", WeightScheme(group_size=32, symmetric=False))
    stored = GPTQ_V2.encode(random_codes(asymmetric.weights, 8, 64, torch.float16), asymmetric, torch.float16)
    with pytest.raises(FormatError, match="sym: true"):
        GPTQ_V2.decode(stored, Scheme("w4a16", WeightScheme(group_size=32)))


def test_group_index_of_a_plain_checkpoint_is_honoured():
    moved = WeightScheme(group_size=32, reordered=True)
    tensor = random_codes(moved, 8, 64, torch.float16)
    stored = GPTQ.encode(tensor, Scheme("w4a16", moved), torch.float16)
    decoded = GPTQ.decode(stored, Scheme("w4a16", WeightScheme(group_size=32)))
    assert torch.equal(decoded.dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme("w4a16", WeightScheme(symmetric=False)), "gptq_v2"),
        (Scheme("w5a16", WeightScheme(bits=5)), "compressed-tensors"),
        (Scheme("fp8", WeightScheme("float", 8, "channel", 0)), "compressed-tensors"),
        (Scheme("w8a8", WeightScheme("int", 8, "channel", 0), ActivationScheme()), "compressed-tensors"),
        (Scheme("w4a16", WeightScheme("int", 4, "channel", 0, reordered=True)), "desc_act"),
        (Scheme("w16a16", None), "compressed-tensors"),
    ],
)
def test_what_version_1_refuses_names_what_works(scheme, reason):
    assert reason in GPTQ.refuse(scheme)


@pytest.mark.parametrize(("bits", "shape"), [(4, (12, 64)), (4, (16, 60)), (3, (24, 64)), (4, (16, 96))])
def test_sizes_that_do_not_fit_are_known_before_calibration(bits, shape):
    with pytest.raises(FormatError, match="multiple"):
        GPTQ.layout(Scheme("any", WeightScheme(bits=bits, group_size=64)), shape, torch.float16)


@pytest.mark.parametrize("value", [1.0001, 7e4, 1e-9, float("nan")])
def test_scales_that_float16_would_change_are_refused(value):
    scheme = Scheme("w4a16", WeightScheme(group_size=32))
    tensor = random_codes(scheme.weights, 8, 64, torch.float32)
    tensor.scale.fill_(value)
    with pytest.raises(FormatError, match="scale"):
        GPTQ.encode(tensor, scheme, torch.float16)


def test_layers_that_differ_are_told_apart_by_name_and_by_merged_name():
    small, large = Scheme("w4a16", WeightScheme(group_size=64)), Scheme("w8a16", WeightScheme(bits=8, group_size=32))
    block = "model.layers.{}.self_attn.{}_proj"
    layers = {block.format(layer, part): small for layer in range(12) for part in "qkvo"}
    layers |= {block.format(1, part): large for part in "qkv"}
    config = GPTQ.quantization_config(layers, ["model.layers.2.mlp.down_proj", "lm_head"])
    scheme_of = GPTQ.schemes(config)
    assert all(scheme_of(name).weights == scheme.weights for name, scheme in layers.items())
    assert scheme_of("model.layers.2.mlp.down_proj") is None
    # vLLM asks for the merged projection with re.match and takes the first rule that matches.
    rules = [rule for rule in config["dynamic"] if re.match(rule[2:], "model.layers.1.self_attn.qkv_proj")]
    assert [config["dynamic"][rule]["bits"] for rule in rules] == [8]
    assert not any(re.match(rule[2:], "model.layers.11.self_attn.qkv_proj") for rule in config["dynamic"])
    assert GPTQ.files(config) == {"quantize_config.json": config}


@pytest.mark.parametrize(
    "change", [{"bits": None}, {"bits": 5}, {"bits": True}, {"group_size": "x"}, {"sym": 1}, {"dynamic": []}]
)
def test_broken_configuration_is_a_format_error(change):
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:x": {"bits": 8}}} | change
    if change == {"dynamic": []}:
        assert GPTQ.schemes(config)("a").weights.bits == 4
        return
    with pytest.raises(FormatError, match="quantization_config"):
        GPTQ.schemes(config)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_missing_or_misshapen_tensors_are_format_errors(suffix):
    scheme = Scheme("w4a16", WeightScheme(group_size=32))
    stored = GPTQ.encode(random_codes(scheme.weights, 16, 64, torch.float16), scheme, torch.float16)
    without = {name: tensor for name, tensor in stored.items() if name != suffix}
    for broken in (without, stored | {suffix: stored[suffix][:, :1]}, stored | {suffix: stored[suffix].flatten()}):
        with pytest.raises(FormatError):
            GPTQ.decode(broken, scheme)
    with pytest.raises(FormatError, match="group 2"):
        GPTQ.decode(stored | {"g_idx": stored["g_idx"] + 1}, scheme)
