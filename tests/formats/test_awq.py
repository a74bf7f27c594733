from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.core.errors import FormatError
from lowbit.core.scheme import ActivationScheme, Scheme, WeightScheme
from lowbit.formats import format_of
from lowbit.formats.awq import AWQ

from .reference import read_awq
from .samples import assert_layout, assert_same, random_codes


@settings(max_examples=40, deadline=None)
@given(
    group=st.sampled_from([0, 16, 32]),
    symmetric=st.booleans(),
    rows=st.sampled_from([8, 40]),
    columns=st.sampled_from([32, 96]),
    seed=st.integers(0, 1000),
)
def test_round_trip_agrees_with_a_literal_reader(group, symmetric, rows, columns, seed):
    weights = WeightScheme(symmetric=symmetric).with_group_size(group)
    scheme = Scheme("w4a16", weights)
    tensor = random_codes(weights, rows, columns, torch.float16, seed)
    stored = AWQ.encode(tensor, scheme, torch.bfloat16)
    assert_layout(AWQ.layout(scheme, (rows, columns), torch.bfloat16), stored)
    assert_same(AWQ.decode(stored, scheme), tensor)
    config = AWQ.quantization_config({"model.a": scheme}, ["model.b", "lm_head"])
    assert format_of(config) is AWQ
    assert torch.equal(read_awq(stored, config), tensor.dequantize(torch.float64))
    read_back = AWQ.schemes(config)("model.a")
    assert read_back.weights == WeightScheme(symmetric=False).with_group_size(group)
    assert torch.equal(AWQ.decode(stored, read_back).dequantize(), tensor.dequantize())
    assert AWQ.schemes(config)("model.b") is None


def test_order_of_nibbles():
    scheme = Scheme("w4a16", WeightScheme(group_size=8))
    tensor = random_codes(scheme.weights, 8, 8, torch.float16)
    tensor.codes.copy_(torch.arange(8, dtype=torch.uint8).unsqueeze(1).expand(8, 8))
    # Outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble up.
    assert AWQ.encode(tensor, scheme, torch.float16)["qweight"].flatten().tolist() == [0x75316420] * 8


def test_one_configuration_for_all_layers():
    small, large = Scheme("w4a16", WeightScheme(group_size=64)), Scheme("w4a16", WeightScheme(group_size=128))
    with pytest.raises(FormatError, match=r"model\.b is not quantized like the others"):
        AWQ.quantization_config({"model.a": small, "model.c": small, "model.b": large}, [])
    with pytest.raises(FormatError, match=r"model\.mlp\.gate_proj too"):
        AWQ.quantization_config({"model.mlp.gate_proj": small}, ["model.mlp.gate"])


def test_other_spellings_are_read_and_other_versions_are_not():
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    assert AWQ.schemes(config)("a").weights == WeightScheme(group_size=64, symmetric=False)
    with pytest.raises(FormatError, match="gemv"):
        AWQ.schemes(config | {"version": "GEMV"})
    with pytest.raises(FormatError, match="group_size"):
        AWQ.schemes({"bits": 4})


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme("w8a16", WeightScheme(bits=8)), "compressed-tensors"),
        (Scheme("w4a16", WeightScheme(reordered=True)), "act-order"),
        (Scheme("w4a8", WeightScheme(), ActivationScheme()), "compressed-tensors"),
        (Scheme("w16a16", None), "compressed-tensors"),
    ],
)
def test_refusals_name_what_works(scheme, reason):
    assert reason in AWQ.refuse(scheme)


def test_outputs_that_do_not_fill_words_are_known_before_calibration():
    with pytest.raises(FormatError, match="multiple of 8"):
        AWQ.layout(Scheme("w4a16", WeightScheme(group_size=32)), (12, 64), torch.float16)


def test_symmetric_layer_with_other_zero_points_is_an_error():
    asymmetric = Scheme("w4a16", WeightScheme(group_size=32, symmetric=False))
    stored = AWQ.encode(random_codes(asymmetric.weights, 16, 64, torch.float16), asymmetric, torch.float16)
    with pytest.raises(FormatError, match="zero points"):
        AWQ.decode(stored, Scheme("w4a16", WeightScheme(group_size=32)))
