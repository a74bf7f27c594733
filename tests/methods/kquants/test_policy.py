"""llama-quantize's choice of types, written down by hand from its source for models of several shapes."""

from __future__ import annotations

import pytest

from lowbit.core.errors import FormatError
from lowbit.core.ggml_types import FILE_TYPES
from lowbit.methods.kquants.policy import ModelInfo, PolicyOptions, TensorInfo, parse_tensor_type, tensor_types


def llama(hidden: int, ffn: int, layers: int, kv: int, *, tied: bool, experts: int = 0) -> list[TensorInfo]:
    """Tensors of a llama-family GGUF in the converter's order (matrices F16, vectors F32)."""
    tensors = [TensorInfo("token_embd.weight", (32000, hidden), "F16")]
    for i in range(layers):
        up, down = ((ffn, hidden), (hidden, ffn)) if not experts else ((experts, ffn, hidden), (experts, hidden, ffn))
        suffix = "_exps" if experts else ""
        shapes = {
            "attn_norm": (hidden,),
            f"ffn_down{suffix}": down,
            f"ffn_gate{suffix}": up,
            f"ffn_up{suffix}": up,
            "ffn_norm": (hidden,),
            "attn_k": (kv, hidden),
            "attn_output": (hidden, hidden),
            "attn_q": (hidden, hidden),
            "attn_v": (kv, hidden),
        }
        if experts:
            shapes["ffn_gate_inp"] = (experts, hidden)
        for name, shape in shapes.items():
            kind = "F32" if len(shape) == 1 or name == "ffn_gate_inp" else "F16"
            tensors.append(TensorInfo(f"blk.{i}.{name}.weight", shape, kind))
    tensors.append(TensorInfo("output_norm.weight", (hidden,), "F32"))
    if not tied:
        tensors.append(TensorInfo("output.weight", (32000, hidden), "F16"))
    return tensors


SMALL = ModelInfo("llama", 30, 9, 3)
NARROW = llama(576, 1536, 30, 192, tied=True)
WIDE = llama(768, 1536, 30, 256, tied=True)
LLAMA_7B = ModelInfo("llama", 32, 32, 32)
SEVEN = llama(4096, 11008, 32, 4096, tied=False)
LLAMA_70B = ModelInfo("llama", 80, 64, 8)
SEVENTY = llama(8192, 28672, 80, 1024, tied=False)
MIXTRAL = ModelInfo("llama", 32, 32, 8, 8)
EXPERTS = llama(4096, 14336, 32, 1024, tied=False, experts=8)

MORE_30 = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29}
MORE_32 = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
FIRST = set(range(80))

# model, ftype, has_imatrix, default of matrices, {tensor: type}, {block tensor: (blocks, type, type elsewhere)}
TABLE = [
    (SMALL, NARROW, "Q4_K_M", False, "Q5_0", {"token_embd": "Q8_0"}, {
        "attn_v": (MORE_30, "Q8_0", "Q5_0"), "ffn_down": (MORE_30, "Q6_K", "Q4_K")}),
    (SMALL, NARROW, "Q3_K_S", False, "Q4_0", {"token_embd": "Q8_0"}, {"ffn_down": (FIRST, "Q3_K", "")}),
    (SMALL, NARROW, "Q3_K_M", False, "Q4_0", {"token_embd": "Q8_0"}, {
        "attn_v": ({0, 1}, "Q5_1", "Q5_0"), "ffn_down": ({0}, "Q5_K", "Q4_K"), "attn_output": (FIRST, "Q5_0", "")}),
    (SMALL, NARROW, "Q2_K", False, "Q4_0", {"token_embd": "Q8_0"}, {"ffn_down": (FIRST, "Q3_K", "")}),
    (SMALL, NARROW, "Q5_K_M", False, "Q5_1", {"token_embd": "Q8_0"}, {
        "attn_v": (MORE_30, "Q8_0", "Q5_1"), "ffn_down": (MORE_30, "Q6_K", "Q5_K")}),
    (SMALL, NARROW, "Q6_K", False, "Q8_0", {"token_embd": "Q8_0"}, {"ffn_down": (FIRST, "Q6_K", "")}),
    (SMALL, NARROW, "IQ4_XS", False, "IQ4_NL", {"token_embd": "Q8_0"}, {"ffn_down": ({0, 1, 2}, "Q5_K", "IQ4_XS")}),
    (SMALL, NARROW, "Q4_0", False, "Q4_0", {"token_embd": "Q8_0"}, {}),
    (SMALL, NARROW, "Q4_0", True, "Q4_0", {"token_embd": "Q8_0"}, {"ffn_down": ({0, 1, 2}, "Q4_1", "Q4_0")}),
    (SMALL, WIDE, "Q4_K_M", False, "Q4_K", {"token_embd": "Q6_K"}, {
        "attn_v": (MORE_30, "Q6_K", "Q4_K"), "ffn_down": (MORE_30, "Q6_K", "Q4_K")}),
    (SMALL, WIDE, "Q4_K_S", False, "Q4_K", {"token_embd": "Q6_K"}, {
        "attn_v": ({0, 1, 2, 3}, "Q5_K", "Q4_K"), "ffn_down": ({0, 1, 2}, "Q5_K", "Q4_K")}),
    (SMALL, WIDE, "Q3_K_S", True, "Q3_K", {"token_embd": "Q6_K"}, {}),
    (SMALL, WIDE, "Q3_K_L", False, "Q3_K", {"token_embd": "Q6_K"}, {
        "attn_v": (FIRST, "Q5_K", ""), "ffn_down": (FIRST, "Q5_K", ""), "attn_output": (FIRST, "Q5_K", "")}),
    (SMALL, WIDE, "Q2_K", False, "Q2_K", {"token_embd": "Q6_K"}, {
        "attn_v": (FIRST, "Q3_K", ""), "ffn_down": (FIRST, "Q3_K", ""), "attn_output": (FIRST, "Q3_K", "")}),
    (SMALL, WIDE, "Q8_0", False, "Q8_0", {"token_embd": "Q8_0"}, {}),
    (SMALL, WIDE, "BF16", False, "BF16", {"token_embd": "BF16"}, {}),
    (LLAMA_7B, SEVEN, "Q4_K_M", False, "Q4_K", {"token_embd": "Q4_K", "output": "Q6_K"}, {
        "attn_v": (MORE_32, "Q6_K", "Q4_K"), "ffn_down": (MORE_32, "Q6_K", "Q4_K")}),
    (LLAMA_7B, SEVEN, "Q3_K_M", False, "Q3_K", {"token_embd": "Q3_K", "output": "Q6_K"}, {
        "attn_v": ({0, 1}, "Q5_K", "Q4_K"), "ffn_down": ({0, 1}, "Q5_K", "Q4_K"), "attn_output": (FIRST, "Q4_K", "")}),
    (LLAMA_7B, SEVEN, "Q5_K_S", False, "Q5_K", {"token_embd": "Q5_K", "output": "Q6_K"}, {}),
    (LLAMA_7B, SEVEN, "Q5_0", True, "Q5_0", {"token_embd": "Q5_0", "output": "Q6_K"}, {
        "ffn_down": ({0, 1, 2, 3}, "Q5_1", "Q5_0")}),
    (LLAMA_7B, SEVEN, "Q4_1", True, "Q4_1", {"token_embd": "Q4_1", "output": "Q6_K"}, {}),
    (LLAMA_7B, SEVEN, "IQ4_XS", True, "IQ4_XS", {"token_embd": "IQ4_XS", "output": "Q6_K"}, {}),
    (LLAMA_7B, SEVEN, "IQ4_NL", False, "IQ4_NL", {"token_embd": "IQ4_NL", "output": "Q6_K"}, {
        "ffn_down": ({0, 1, 2, 3}, "Q5_K", "IQ4_NL")}),
    (LLAMA_70B, SEVENTY, "Q4_K_S", False, "Q4_K", {"token_embd": "Q4_K", "output": "Q6_K"}, {
        "attn_v": (FIRST, "Q5_K", ""), "ffn_down": (set(range(10)), "Q5_K", "Q4_K")}),
    (LLAMA_70B, SEVENTY, "Q3_K_S", False, "Q3_K", {"token_embd": "Q3_K", "output": "Q6_K"}, {
        "attn_v": (FIRST, "Q5_K", "")}),
    (LLAMA_70B, SEVENTY, "Q2_K", False, "Q2_K", {"token_embd": "Q2_K", "output": "Q6_K"}, {
        "attn_v": (FIRST, "Q5_K", ""), "ffn_down": (FIRST, "Q3_K", ""), "attn_output": (FIRST, "Q3_K", "")}),
    (LLAMA_70B, SEVENTY, "IQ4_XS", True, "IQ4_XS", {"token_embd": "IQ4_XS", "output": "Q6_K"}, {
        "attn_v": (FIRST, "Q5_K", "")}),
    (MIXTRAL, EXPERTS, "Q4_K_M", False, "Q4_K", {"token_embd": "Q4_K", "output": "Q6_K"}, {
        "attn_v": (FIRST, "Q8_0", ""), "attn_k": (FIRST, "Q8_0", ""), "attn_output": (FIRST, "Q5_K", ""),
        "ffn_down_exps": (MORE_32, "Q6_K", "Q4_K"), "ffn_gate_inp": (FIRST, "F32", "")}),
    (MIXTRAL, EXPERTS, "MXFP4", False, "Q8_0", {"token_embd": "Q8_0", "output": "Q8_0"}, {
        "ffn_down_exps": (FIRST, "MXFP4", ""), "ffn_up_exps": (FIRST, "MXFP4", ""),
        "ffn_gate_exps": (FIRST, "MXFP4", ""), "ffn_gate_inp": (FIRST, "F32", "")}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "tensors", "ftype", "has_imatrix", "default", "named", "blocks"),
    TABLE,
    ids=[f"{row[2]}-{row[0].n_layer}x{row[1][0].shape[1]}{'-imatrix' * row[3]}" for row in TABLE],
)
def test_types_by_hand(model, tensors, ftype, has_imatrix, default, named, blocks):
    chosen = tensor_types(ftype, tensors, model, PolicyOptions(has_imatrix=has_imatrix))
    assert list(chosen) == [tensor.name for tensor in tensors]
    for tensor in tensors:
        part = tensor.name.removesuffix(".weight")
        _, _, block_part = part.rpartition(".")
        if "norm" in part:
            expected = "F32"
        elif part in named:
            expected = named[part]
        elif block_part in blocks:
            layers, inside, outside = blocks[block_part]
            expected = inside if int(part.split(".")[1]) in layers else outside
        else:
            expected = default
        assert chosen[tensor.name] == expected, tensor.name


def test_order_of_tensors_does_not_matter():
    assert tensor_types("Q4_K_M", WIDE[::-1], SMALL) == tensor_types("Q4_K_M", WIDE, SMALL)


def test_falcon_has_rules_of_its_own():
    tensors = [
        TensorInfo(f"blk.{i}.{name}.weight", shape)
        for i in range(32)
        for name, shape in {"attn_qkv": (4672, 4544), "attn_output": (4544, 4544), "ffn_down": (4544, 18176)}.items()
    ] + [TensorInfo("output.weight", (65024, 4544))]
    chosen = tensor_types("Q4_K_M", tensors, ModelInfo("falcon", 32, 71, 1))
    down = [chosen[f"blk.{i}.ffn_down.weight"] for i in range(32)]
    assert down[:7] == ["Q6_K", "Q6_K", "Q5_K", "Q5_K", "Q4_K", "Q4_K", "Q5_K"]
    assert chosen["output.weight"] == "Q8_0"
    assert chosen["blk.0.attn_output.weight"] == "Q5_0"  # 4544 columns
    assert chosen["blk.0.attn_qkv.weight"] == "Q8_0"  # Q6_K by the attn_v rule, 4544 columns


def test_options():
    def chosen(**options):
        return tensor_types("Q4_K_M", SEVEN, LLAMA_7B, PolicyOptions(**options))

    assert set(chosen(pure=True).values()) == {"Q4_K", "F32"}
    assert chosen(leave_output_tensor=True)["output.weight"] == "F16"
    assert chosen(output_tensor_type="Q8_0")["output.weight"] == "Q8_0"
    assert chosen(token_embedding_type="q5_k")["token_embd.weight"] == "Q5_K"
    overridden = chosen(tensor_overrides=(("attn_v", "Q8_0"), (r"blk\.3\..*", "Q2_K")))
    assert overridden["blk.3.attn_v.weight"] == "Q8_0"
    assert overridden["blk.3.attn_q.weight"] == "Q2_K"
    assert overridden["blk.3.attn_norm.weight"] == "F32"
    assert overridden["blk.0.ffn_down.weight"] == "Q6_K"


def test_an_override_does_not_count_as_a_layer():
    # llama-quantize counts only the tensors its mixture decides on, so block 1 becomes the first of them.
    overridden = tensor_types("Q3_K_M", SEVEN, LLAMA_7B, PolicyOptions(tensor_overrides=((r"blk\.0\.attn_v", "Q8_0"),)))
    values = [overridden[f"blk.{i}.attn_v.weight"] for i in range(4)]
    assert values == ["Q8_0", "Q5_K", "Q5_K", "Q4_K"]


def test_the_output_type_of_a_tied_model_goes_to_the_embedding():
    chosen = tensor_types("Q4_K_M", WIDE, SMALL, PolicyOptions(output_tensor_type="Q8_0"))
    assert chosen["token_embd.weight"] == "Q8_0"
    both = PolicyOptions(output_tensor_type="Q8_0", token_embedding_type="Q4_0")
    assert tensor_types("Q4_K_M", WIDE, SMALL, both)["token_embd.weight"] == "Q4_0"


def test_what_is_never_quantized():
    kept = ["blk.0.ssm_conv1d.weight", "blk.0.time_mix_w1.weight", "position_embd.weight", "blk.0.attn_q.bias"]
    tensors = [TensorInfo(name, (256, 256), "F16") for name in kept] + [TensorInfo("blk.0.attn_q.weight", (1, 256))]
    chosen = tensor_types("Q4_0", tensors, SMALL)
    assert chosen == {**dict.fromkeys(kept, "F16"), "blk.0.attn_q.weight": "F32"}


def test_rows_no_block_divides():
    odd = [TensorInfo("blk.0.attn_q.weight", (64, 100)), TensorInfo("output.weight", (8, 256))]
    assert tensor_types("Q4_K_M", odd, SMALL)["blk.0.attn_q.weight"] == "F16"
    with pytest.raises(FormatError, match=r"attn_q.*100"):
        tensor_types("Q8_0", odd, SMALL)


def test_parsing_of_tensor_type():
    assert parse_tensor_type("Attn_V=q6_k") == ("attn_v", "Q6_K")
    assert parse_tensor_type(r"blk\.(1|2)\.=Q8_0") == (r"blk\.(1|2)\.", "Q8_0")
    for wrong in ("attn_v", "=Q4_0", "attn_v=Q9", "attn_v(=Q4_0"):
        with pytest.raises(FormatError):
            parse_tensor_type(wrong)


def test_unknown_file_type():
    with pytest.raises(FormatError, match=r"did you mean 'Q4_K_M'"):
        tensor_types("Q4_KM", WIDE, SMALL)


@pytest.mark.parametrize("ftype", FILE_TYPES)
def test_every_file_type_gives_every_tensor_a_type(ftype):
    for model, tensors in ((SMALL, NARROW), (SMALL, WIDE), (LLAMA_70B, SEVENTY), (MIXTRAL, EXPERTS)):
        assert set(tensor_types(ftype, tensors, model)) == {tensor.name for tensor in tensors}
