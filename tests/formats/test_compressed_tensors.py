from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.core.errors import FormatError
from lowbit.core.packing import pack_int32
from lowbit.core.qtensor import QTensor
from lowbit.core.scheme import ActivationScheme, Scheme, WeightScheme
from lowbit.formats import format_of
from lowbit.formats.compressed_tensors import COMPRESSED_TENSORS as FORMAT
from lowbit.formats.reader import ArtifactCheckpoint

from .reference import read_fp4, read_packed, read_scaled
from .samples import assert_layout, assert_same, linear_names, load, logits, random_codes, store, tiny_llama

W8A8 = Scheme("w8a8", WeightScheme("int", 8, "channel", 0), ActivationScheme())
W8A8_STATIC = Scheme("w8a8", WeightScheme("int", 8, "channel", 0), ActivationScheme("int", 8, "tensor", False))
FP8 = Scheme("fp8", WeightScheme("float", 8, "channel", 0), ActivationScheme("float"))
FP8_STATIC = Scheme("fp8", WeightScheme("float", 8, "tensor", 0), ActivationScheme("float", 8, "tensor", False))
FP8_BLOCK = Scheme("fp8", WeightScheme("float", 8, "block", 128), ActivationScheme("float", 8, "group", True, 128))
FP8_ONLY = Scheme("fp8a16", WeightScheme("float", 8, "channel", 0))
NVFP4 = Scheme("nvfp4", WeightScheme("nvfp4", 4, "group", 16), ActivationScheme("nvfp4", 4, "group", True, 16))
NVFP4_ONLY = Scheme("nvfp4a16", WeightScheme("nvfp4", 4, "group", 16))
MXFP4 = Scheme("mxfp4", WeightScheme("mxfp4", 4, "group", 32), ActivationScheme("mxfp4", 4, "group", True, 32))
MXFP4_ONLY = Scheme("mxfp4a16", WeightScheme("mxfp4", 4, "group", 32))
FP4 = (NVFP4, NVFP4_ONLY, MXFP4, MXFP4_ONLY)


def sample(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> QTensor:
    weights = scheme.weights
    if weights.kind == "mxfp4":
        tensor = random_codes(weights, rows, columns, torch.float32, seed)
        exponents = torch.randint(115, 123, tensor.scale.shape, generator=torch.Generator().manual_seed(seed))
        return QTensor(tensor.codes, exponents.to(torch.uint8), weights)
    if weights.kind == "nvfp4":
        tensor = random_codes(weights, rows, columns, torch.float32, seed)
        extra = {"global_scale": torch.tensor([1234.5])}
        if scheme.activations:
            extra["input_global_scale"] = torch.tensor([77.0])
        return QTensor(tensor.codes, (tensor.scale * 2000).to(torch.float8_e4m3fn), weights, extra=extra)
    tensor = random_codes(weights, rows, columns, dtype, seed)
    if scheme.activations and not scheme.activations.dynamic:
        extra = {"input_scale": torch.tensor([0.03125], dtype=dtype)}
        return QTensor(tensor.codes, tensor.scale, weights, tensor.zero, extra=extra)
    return tensor


def packed_scheme(bits: int, group: int, symmetric: bool) -> Scheme:
    return Scheme(f"w{bits}a16", WeightScheme(bits=bits, symmetric=symmetric).with_group_size(group))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([0, 16, 32]),
    symmetric=st.booleans(),
    rows=st.sampled_from([8, 33]),
    columns=st.sampled_from([32, 96]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_packed_integers_agree_with_a_literal_reader(bits, group, symmetric, rows, columns, dtype, seed):
    scheme = packed_scheme(bits, group, symmetric)
    tensor = sample(scheme, rows, columns, dtype, seed)
    stored = FORMAT.encode(tensor, scheme, dtype)
    assert_layout(FORMAT.layout(scheme, (rows, columns), dtype), stored)
    config = FORMAT.quantization_config({"model.a": scheme}, [])
    assert_same(FORMAT.decode(stored, FORMAT.schemes(config)("model.a")), tensor)
    dense = read_packed(stored, config["config_groups"]["group_0"]["weights"])
    assert torch.equal(dense, tensor.dequantize(torch.float64))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dim", [0, 1])
def test_our_words_are_the_librarys(bits, dim):
    codes = torch.randint(0, 2**bits, (45, 37), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_int32(codes, bits, dim), pack_to_int32(signed, bits, packed_dim=dim))


@pytest.mark.parametrize("scheme", [W8A8, W8A8_STATIC, FP8, FP8_STATIC, FP8_BLOCK, FP8_ONLY, *FP4])
def test_whole_weights_round_trip_and_agree_with_a_literal_reader(scheme):
    shape = (130, 256)
    tensor = sample(scheme, *shape, torch.bfloat16)
    stored = FORMAT.encode(tensor, scheme, torch.bfloat16)
    assert_layout(FORMAT.layout(scheme, shape, torch.bfloat16), stored)
    config = FORMAT.quantization_config({"model.a": scheme}, [])
    read_back = FORMAT.schemes(config)("model.a")
    assert (read_back.weights, read_back.activations) == (scheme.weights, scheme.activations)
    assert_same(FORMAT.decode(stored, read_back), tensor)
    if scheme in FP4:
        dense = read_fp4(stored, scheme.weights.group_size)
    else:
        dense = read_scaled(stored, 128 if scheme is FP8_BLOCK else None)
    # The reference works in float64, a QTensor in float32.
    torch.testing.assert_close(tensor.dequantize(), dense.float(), rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (packed_scheme(4, 32, True), "pack-quantized"),
        (packed_scheme(8, 0, False), "pack-quantized"),
        (W8A8, "int-quantized"),
        (W8A8_STATIC, "int-quantized"),
        (FP8, "float-quantized"),
        (FP8_BLOCK, "float-quantized"),
        (FP8_ONLY, "naive-quantized"),
        (NVFP4, "nvfp4-pack-quantized"),
        (MXFP4_ONLY, "mxfp4-pack-quantized"),
    ],
)
def test_configuration_is_the_librarys_and_names_its_compressor(scheme, name):
    config = FORMAT.quantization_config({"model.a": scheme}, ["model.b"])
    assert QuantizationConfig.model_validate(config).model_dump(mode="json") == config
    assert config["format"] == config["config_groups"]["group_0"]["format"] == name
    assert config["ignore"] == ["model.b", "lm_head"]
    assert format_of(config) is FORMAT


def test_a_quantized_head_is_not_ignored_and_a_kv_cache_is_described():
    config = FORMAT.quantization_config({"lm_head": W8A8}, ["model.b"], kv_cache="fp8")
    assert config["ignore"] == ["model.b"]
    assert (config["kv_cache_scheme"]["num_bits"], config["kv_cache_scheme"]["type"]) == (8, "float")
    with pytest.raises(FormatError, match="KV cache"):
        FORMAT.quantization_config({"lm_head": W8A8}, [], kv_cache="fp3")


def test_exact_names_win_over_expressions_and_expressions_over_classes():
    weights = {"num_bits": 8, "strategy": "channel"}
    groups = {
        "a": {"targets": ["Linear"], "weights": weights | {"num_bits": 4}},
        "b": {"targets": ["re:.*down_proj$"], "weights": weights | {"num_bits": 6}},
        "c": {"targets": ["model.layers.0.mlp.down_proj"], "weights": weights},
    }
    config = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["re:.*gate$"]}
    bits = {
        name: scheme and scheme.bits
        for name in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.x.up_proj", "model.gate")
        for scheme in [FORMAT.schemes(config)(name)]
    }
    assert list(bits.values()) == [8, 6, 4, None]


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme("w4a16", WeightScheme(reordered=True)), "act-order"),
        (Scheme("w4a8", WeightScheme(), ActivationScheme()), "w8a8"),
        (Scheme("nf4", WeightScheme("nf4", 4, "group", 64)), "bitsandbytes"),
        (Scheme("fp8", WeightScheme("float", 8, "group", 128)), "fp8"),
        (Scheme("mxfp4", WeightScheme("mxfp4", 4, "group", 64)), "32"),
        (Scheme("w8a8", WeightScheme("int", 8, "channel", 0), ActivationScheme("int", 8, "token", False)), "static"),
    ],
)
def test_refusals_name_what_works(scheme, reason):
    assert reason in FORMAT.refuse(scheme)


def test_rounded_scales_and_missing_input_scales_are_refused():
    tensor = sample(W8A8, 8, 32, torch.float32)
    with pytest.raises(FormatError, match="rounded"):
        FORMAT.encode(tensor, W8A8, torch.bfloat16)
    with pytest.raises(FormatError, match="input_scale"):
        FORMAT.encode(sample(W8A8, 8, 32, torch.float16), W8A8_STATIC, torch.float16)


@pytest.mark.parametrize("scheme", [packed_scheme(4, 16, False), W8A8, FP8, NVFP4, MXFP4], ids=lambda s: s.name)
def test_missing_or_misshapen_tensors_are_format_errors(scheme):
    stored = FORMAT.encode(sample(scheme, 16, 64, torch.float16), scheme, torch.float16)
    for suffix in set(stored) - {"input_scale"}:
        without = {name: tensor for name, tensor in stored.items() if name != suffix}
        for broken in (without, stored | {suffix: torch.zeros(3, 3, 3)}):
            with pytest.raises(FormatError):
                FORMAT.decode(broken, scheme)


def test_what_the_library_rejects_is_a_format_error():
    with pytest.raises(FormatError, match="rejects"):
        FORMAT.schemes({"config_groups": {"a": {"targets": ["Linear"], "weights": {"strategy": "diagonal"}}}})
    with pytest.raises(FormatError, match="act"):
        FORMAT.schemes({"config_groups": {"a": {"targets": ["Linear"], "weights": {"actorder": "group"}}}})


CONSUMED = {
    "w4a16": packed_scheme(4, 32, True),
    "w3a16-channel": packed_scheme(3, 0, True),
    "w8a16": packed_scheme(8, 64, True),
    "fp8-weights": FP8_ONLY,
    "nvfp4-weights": NVFP4_ONLY,
    "mxfp4-weights": MXFP4_ONLY,
}


def store_random(folder, scheme_of, dtype, hidden=64):
    def quantize(name, weight, scheme):
        return sample(scheme, *weight.shape, dtype, seed=len(name) + int(weight.shape[0]))

    return store(folder, tiny_llama(dtype, hidden, hidden * 2), FORMAT, scheme_of, quantize)


@pytest.mark.parametrize("case", CONSUMED)
def test_transformers_computes_with_the_dequantized_weights(tmp_path, case):
    # The library decompresses 4 bit floats to bfloat16, whatever the model's dtype.
    dtype = torch.bfloat16 if "fp4" in case else torch.float32
    reference = store_random(tmp_path, lambda name: CONSUMED[case], dtype)
    model = load(tmp_path, dtype)
    # bfloat16 products are summed in another order when the layer is decompressed anew.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits(model), logits(reference), rtol=tolerance, atol=tolerance)
    for name in linear_names(reference):
        assert torch.equal(model.get_submodule(name).weight, reference.get_submodule(name).weight)


@pytest.mark.parametrize("scheme", [packed_scheme(4, 32, False), packed_scheme(8, 0, False)])
def test_transformers_dequantizes_asymmetric_weights_at_load(tmp_path, scheme):
    """Without `dequantize` transformers 5.23 allocates unpacked zero points (compressed-tensors 0.20, `compress` on
    meta tensors) and then rejects packed ones, whoever wrote them."""
    from transformers import CompressedTensorsConfig

    expected = logits(store_random(tmp_path, lambda name: scheme, torch.float32))
    model = load(tmp_path, torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("scheme", [W8A8, FP8, FP8_BLOCK], ids=lambda s: str(s.activations))
def test_transformers_rounds_activations_on_top(tmp_path, scheme):
    expected = logits(store_random(tmp_path, lambda name: scheme, torch.float32, hidden=128))
    loaded = logits(load(tmp_path, torch.float32))
    assert (loaded - expected).norm() <= 0.1 * expected.norm()
    assert not torch.equal(loaded, expected)


@pytest.mark.parametrize("scheme", [W8A8_STATIC, FP8_STATIC], ids=lambda s: s.name)
def test_transformers_rounds_activations_with_the_stored_scale(tmp_path, scheme):
    model, scale = store_random(tmp_path, lambda name: scheme, torch.float32), 0.03125

    def rounded(module, inputs):
        if scheme is FP8_STATIC:
            return (inputs[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return (inputs[0] / scale).round().clamp(-128, 127) * scale

    for name in linear_names(model):
        model.get_submodule(name).register_forward_pre_hook(rounded)
    expected = logits(model)
    # A few inputs may fall on the other side of a rounding border.
    assert (logits(load(tmp_path, torch.float32)) - expected).norm() <= 0.01 * expected.norm()


def test_transformers_loads_layers_that_differ(tmp_path):
    def scheme_of(name):
        if "layers.1.mlp" in name:
            return None
        return packed_scheme(8, 0, True) if "down_proj" in name else packed_scheme(4, 32, True)

    expected = logits(store_random(tmp_path, scheme_of, torch.float32))
    assert torch.equal(logits(load(tmp_path, torch.float32)), expected)


def test_the_reader_gives_what_was_stored(tmp_path):
    from lowbit.core.checkpoint import open_checkpoint

    def scheme_of(name):
        return {"q": W8A8_STATIC, "o": None}.get(name.split(".")[-1][0], packed_scheme(4, 32, False))

    model = store_random(tmp_path, scheme_of, torch.bfloat16)
    artifact = ArtifactCheckpoint(open_checkpoint(tmp_path))
    state = model.state_dict()
    assert set(artifact.tensors) == set(state)
    for name, tensor in state.items():
        assert (artifact.tensors[name].dtype, artifact.tensors[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(artifact.read(name), tensor)
    assert artifact.scheme("model.layers.0.self_attn.o_proj") is None
    assert artifact.scheme("model.layers.0.self_attn.q_proj").activations == W8A8_STATIC.activations
