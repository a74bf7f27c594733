"""The estimate of a GGUF run against runs that were measured, and in what it must grow with."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from lowbit.formats.gguf import PlannedTensor
from lowbit.pipeline.estimate import Estimate, Machine, Training
from lowbit.pipeline.gguf_estimate import GgufWork, estimate_gguf

# two cores with AMX, as matrix_rate measured them
TWO_CORES = Machine("cpu", 1434e9, 365e9)
Refine = Literal["none", "imatrix", "hessian"]


def llama(layers: int, hidden: int, inner: int, kv: int, vocabulary: int) -> list[PlannedTensor]:
    """A Llama's matrices with a tied head, all of one type."""
    shapes = {
        "attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    tensors = [PlannedTensor("token_embd.weight", (vocabulary, hidden), "Q6_K")]
    for block in range(layers):
        tensors += [PlannedTensor(f"blk.{block}.{name}.weight", shape, "Q4_K") for name, shape in shapes.items()]
    return tensors


def expected(refine: Refine, windows: int = 64, tokens: int = 512, training: Training | None = None) -> Estimate:
    planned = llama(30, 768, 1536, 256, 49152)
    work = GgufWork(refine, windows, tokens, True, training or Training())
    return estimate_gguf(planned, work, TWO_CORES, torch.bfloat16)


@pytest.mark.parametrize(
    ("refine", "seconds", "mebibytes"), [("none", 9.4, 513), ("imatrix", 33.2, 840), ("hessian", 138.0, 1870)]
)
def test_a_measured_run_is_within_a_factor_of_two(refine: Refine, seconds: float, mebibytes: float) -> None:
    """SmolLM2 zero-padded to hidden 768, 64 windows of 512 tokens, Q4_K_M: seconds and VmHWM of the process."""
    found = expected(refine)
    assert seconds / 2 < found.seconds < 2 * seconds
    assert mebibytes / 1.5 < found.memory / 2**20 < 1.5 * mebibytes


def test_text_costs_time_and_memory_only_where_it_is_read() -> None:
    assert expected("none") == expected("none", windows=6400)
    for refine in ("imatrix", "hessian"):
        few, many = expected(refine), expected(refine, windows=640)
        assert many.seconds > 2 * few.seconds
        assert many.memory > few.memory


def test_training_comes_on_top() -> None:
    trained = expected("hessian", training=Training(learn=100, learn_tokens=4096, tune=64, tune_tokens=4096))
    assert trained.seconds > 2 * expected("hessian").seconds


def test_fitting_types_is_within_a_factor_of_two() -> None:
    """SmolLM2 zero-padded to hidden 768, `lowbit fit` on 32 windows of 512 tokens: 183 s on two cores without AVX-512."""
    planned, machine = llama(30, 768, 1536, 256, 49152), Machine("cpu", 87e9, 86e9)
    plain, fitted = (
        estimate_gguf(planned, GgufWork("hessian", 32, 512, True, fits=fits), machine, torch.float32)
        for fits in (False, True)
    )
    assert 183 / 2 < fitted.seconds - plain.seconds < 2 * 183
    assert fitted.memory == plain.memory


def test_hessians_of_wide_layers_are_in_the_memory() -> None:
    planned = llama(2, 8192, 28672, 1024, 32000)
    work = GgufWork("hessian", 128, 2048, False)
    found = estimate_gguf(planned, work, TWO_CORES, torch.bfloat16)
    assert found.memory > 4 * 4 * 28672**2
    assert found.memory > 10 * estimate_gguf(planned, GgufWork("none", 0, 0, False), TWO_CORES, torch.bfloat16).memory


def test_merged_experts_are_not_rounded_to_second_order() -> None:
    dense = llama(2, 1024, 4096, 256, 4096)
    experts = [PlannedTensor(f"blk.{block}.ffn_up_exps.weight", (64, 4096, 1024), "Q4_K") for block in range(2)]
    alone = [PlannedTensor(f"blk.{block}.ffn_up_all.weight", (64 * 4096, 1024), "Q4_K") for block in range(2)]
    work = GgufWork("hessian", 16, 512, False)
    merged, single = (estimate_gguf([*dense, *more], work, TWO_CORES, torch.bfloat16) for more in (experts, alone))
    assert merged.seconds < single.seconds / 2
