from __future__ import annotations

import json

import pytest
import torch

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.codebooks import codebook
from lowbit.core.errors import FormatError, RecipeError
from lowbit.core.scheme import ActivationScheme, Scheme, WeightScheme
from lowbit.formats import format_of
from lowbit.formats.bitsandbytes import BITSANDBYTES, BITSANDBYTES_DOUBLE, LLM_INT8, STATE
from lowbit.formats.reader import ArtifactCheckpoint
from lowbit.methods.bnb import BnbOptions, quantize

from .samples import assert_layout, assert_same, linear_names, load, logits, store, tiny_llama

functional = pytest.importorskip("bitsandbytes.functional")

NF4 = Scheme("nf4", WeightScheme("nf4", 4, "group", 64))
FP4 = Scheme("fp4", WeightScheme("fp4", 4, "group", 64))
VARIANTS = [
    pytest.param(NF4, BITSANDBYTES, id="nf4"),
    pytest.param(FP4, BITSANDBYTES, id="fp4"),
    pytest.param(NF4, BITSANDBYTES_DOUBLE, id="nf4-double"),
    pytest.param(FP4, BITSANDBYTES_DOUBLE, id="fp4-double"),
    pytest.param(LLM_INT8, BITSANDBYTES, id="int8"),
]


def quantized(weight, scheme, fmt):
    return quantize(weight, None, scheme.weights, BnbOptions(), fmt.scale_dtype(scheme, torch.bfloat16)).tensor


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_code_books_are_the_librarys(kind):
    assert torch.equal(codebook(kind), functional.get_4bit_type(kind, device="cpu"))


@pytest.mark.parametrize(("scheme", "fmt"), VARIANTS)
def test_round_trip(scheme, fmt):
    weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(1))
    tensor = quantized(weight, scheme, fmt)
    stored = fmt.encode(tensor, scheme, torch.bfloat16)
    assert_layout(fmt.layout(scheme, (96, 192), torch.bfloat16), stored)
    config = fmt.quantization_config({"model.a": scheme}, ["lm_head"])
    assert format_of(config) is fmt
    read_back = fmt.schemes(config)("model.a")
    assert (read_back.weights, read_back.activations) == (scheme.weights, scheme.activations)
    assert_same(fmt.decode(stored, read_back), tensor)


@pytest.mark.parametrize(("scheme", "fmt"), VARIANTS[:4])
def test_the_library_reads_the_stored_state_and_dequantizes_alike(scheme, fmt):
    weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(2))
    tensor = quantized(weight, scheme, fmt)
    stored = fmt.encode(tensor, scheme, torch.float32)
    parts = {name.removeprefix("weight."): part for name, part in stored.items() if name != "weight"}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    assert torch.equal(functional.dequantize_4bit(stored["weight"], state), tensor.dequantize())


@pytest.mark.parametrize(("scheme", "fmt"), VARIANTS[:4])
def test_what_is_stored_is_what_the_librarys_own_layer_stores(scheme, fmt):
    from bitsandbytes.nn import Params4bit

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    parameter = Params4bit(
        weight, quant_type=scheme.weights.kind, compress_statistics=fmt.double, requires_grad=False, blocksize=64
    ).to("cpu")
    theirs = {"weight": parameter.data} | {
        f"weight.{name}": part for name, part in parameter.quant_state.as_dict(packed=True).items()
    }
    ours = fmt.encode(quantized(weight, scheme, fmt), scheme, torch.bfloat16)
    assert set(ours) == set(theirs)
    state = f"{STATE}{scheme.weights.kind}"
    assert json.loads(bytes(ours.pop(state).tolist())) == json.loads(bytes(theirs.pop(state).tolist()))
    for name, part in ours.items():
        assert part.dtype == theirs[name].dtype
        assert torch.equal(part, theirs[name])


def test_scales_of_any_dtype_survive_the_division_by_127():
    draw = torch.Generator().manual_seed(4)
    for dtype in (torch.float16, torch.bfloat16):
        tensor = quantized(torch.randn(512, 64, generator=draw), LLM_INT8, BITSANDBYTES)
        tensor.scale.copy_(torch.rand(512, 1, generator=draw).to(dtype))
        stored = BITSANDBYTES.encode(tensor, LLM_INT8, dtype)
        assert torch.equal(BITSANDBYTES.decode(stored, LLM_INT8).scale, tensor.scale)


@pytest.mark.parametrize(("scheme", "fmt"), VARIANTS)
def test_transformers_computes_with_the_dequantized_weights(tmp_path, scheme, fmt):
    model = store(
        tmp_path,
        tiny_llama(torch.bfloat16),
        fmt,
        lambda name: scheme,
        lambda name, weight, s: quantized(weight, s, fmt),
    )
    artifact = ArtifactCheckpoint(open_checkpoint(tmp_path))
    for name in linear_names(model):
        assert torch.equal(artifact.read(f"{name}.weight"), model.get_submodule(name).weight)
    expected = logits(model)
    difference = (logits(load(tmp_path, torch.bfloat16, device_map="cpu")) - expected).norm()
    # Besides bfloat16 itself, int8 rounds activations to 8 bits.
    assert difference <= (0.03 if scheme is LLM_INT8 else 0.01) * expected.norm()


@pytest.mark.parametrize(
    ("fmt", "scheme", "reason"),
    [
        (BITSANDBYTES, Scheme("w4a16", WeightScheme()), "nf4"),
        (BITSANDBYTES, Scheme("nf4", WeightScheme("nf4", 4, "group", 48)), "use 64"),
        (BITSANDBYTES, Scheme("nf4", NF4.weights, ActivationScheme()), "16 bit activations"),
        (BITSANDBYTES_DOUBLE, LLM_INT8, "format 'bitsandbytes'"),
    ],
)
def test_refusals_name_what_works(fmt, scheme, reason):
    assert reason in fmt.refuse(scheme)


def test_blocks_that_would_span_rows_and_scales_of_the_other_variant_are_refused():
    with pytest.raises(FormatError, match="multiple of 64"):
        BITSANDBYTES.layout(NF4, (64, 96), torch.float16)
    with pytest.raises(FormatError, match="scales"):
        BITSANDBYTES_DOUBLE.encode(quantized(torch.randn(8, 64), NF4, BITSANDBYTES), NF4, torch.float16)
    with pytest.raises(RecipeError, match="mxfp4"):
        quantize(torch.randn(8, 64), None, WeightScheme("mxfp4", 4, "group", 32), BnbOptions())


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"shape": [1]}', b'{"shape": [8, 64], "blocksize": null}'])
def test_broken_state_is_a_format_error(text):
    stored = BITSANDBYTES.encode(quantized(torch.randn(8, 64), NF4, BITSANDBYTES), NF4, torch.float16)
    broken = stored | {f"{STATE}nf4": torch.tensor(list(text), dtype=torch.uint8)}
    with pytest.raises(FormatError, match="state"):
        BITSANDBYTES.decode(broken, NF4)
