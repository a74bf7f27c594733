"""The last pass over a GGUF file: only float scales and norms move, and the divergence falls."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import lowbit
from lowbit.api.run import Settings
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import RecipeError
from lowbit.core.streamed_model import StreamedModel
from lowbit.methods.kquants import decode
from lowbit.methods.kquants.codec import CODECS
from lowbit.pipeline.factors import Factors
from tests.interrupted import StopAt

TEXT: dict[str, Any] = {"dataset": "pydoc", "num_samples": 48, "seq_len": 64, "options": {"sweeps": 1}}
TYPES = ["Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS"]


def quantized(source: Path, output: Path, method: str, **changes: Any) -> Any:
    return lowbit.quantize(source, output=output, method=method, settings=Settings(verify=False), **{**TEXT, **changes})


@pytest.mark.parametrize("kind", TYPES)
def test_factors_are_factors_of_the_stored_scales(wide_llama: Path, tmp_path: Path, kind: str) -> None:
    """A weight under its factors is what the type dequantizes to with its float scales times those factors."""
    model = StreamedModel(open_checkpoint(wide_llama), torch.device("cpu"), torch.float32)
    codec, path = CODECS[kind], "model.layers.0.self_attn.q_proj"
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) + 0.3
    grid, codes = codec.choose(weight, None)
    minimums = {} if grid.dmin is None else {path: codec.scale_min(grid)[1]}
    columns = {path: torch.arange(256) // (256 // grid.d.shape[1])}
    factors = Factors(model, columns, tmp_path / "state", torch.device("cpu"), minimums)
    factors.values.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    own = factors.block(0)["self_attn.q_proj.weight"]
    found = factors.apply(0, "self_attn.q_proj.weight", codec.dequantize(grid, codes), factors.block(0))
    scale, minimum = (own, None) if grid.dmin is None else own.unbind()
    moved = replace(
        grid,
        d=grid.d.float() * (1 + scale),
        dmin=None if grid.dmin is None or minimum is None else grid.dmin.float() * (1 + minimum),
    )
    assert torch.allclose(found, codec.dequantize(moved, codes), atol=1e-5)


@pytest.mark.parametrize("method", ["q4_k_m", "q3_k_s"])
def test_tuning_moves_float_scales_and_norms_and_lowers_the_divergence(
    wide_llama: Path, wide_gguf: Path, tmp_path: Path, method: str
) -> None:
    # damped so far that second-order rounding only rounds to nearest: a start that leaves something to gain
    rough = {"num_samples": 96, "seq_len": 128, "options": {"sweeps": 0, "damping": 100.0}}
    results = [quantized(wide_gguf, tmp_path / f"{steps}.gguf", method, tune_steps=steps, **rough) for steps in (0, 40)]
    kl = [lowbit.evaluate(r.path, base=wide_llama, dataset="pydoc", windows=16, context=64).kl for r in results]
    assert kl[1] < 0.98 * kl[0]
    assert results[1].record["tuning"]["after"] < results[1].record["tuning"]["before"]
    before, after = ({t.name: t for t in gguf.GGUFReader(r.path).tensors} for r in results)
    changed = set()
    for name, old in before.items():
        new = after[name]
        assert old.tensor_type == new.tensor_type
        if old.data.tobytes() == new.data.tobytes():
            continue
        changed.add(name.split(".")[2])
        if old.tensor_type.name in CODECS:
            grids = [CODECS[old.tensor_type.name].unpack(torch.tensor(t.data)) for t in (old, new)]
            assert torch.equal(grids[0][1], grids[1][1])
            assert torch.equal(grids[0][0].scale_codes, grids[1][0].scale_codes)
            largest = (grids[1][0].d.float() / grids[0][0].d.float() - 1).abs().nan_to_num().max()
            assert 1e-4 < largest < 0.5
            decode(old.tensor_type.name, torch.tensor(new.data), int(old.shape[0]))
    assert changed >= {"attn_norm", "ffn_norm", "attn_q", "attn_v", "ffn_down"}


def test_an_interrupted_last_pass_continues_to_the_same_bytes(wide_gguf: Path, tmp_path: Path) -> None:
    changes = {"tune_steps": 24, "num_samples": 16}
    whole = quantized(wide_gguf, tmp_path / "whole" / "m.gguf", "q4_k_m", **changes)
    with pytest.raises(KeyboardInterrupt):
        quantized(wide_gguf, tmp_path / "parts" / "m.gguf", "q4_k_m", progress=StopAt("tune", 19), **changes)
    parts = quantized(wide_gguf, tmp_path / "parts" / "m.gguf", "q4_k_m", **changes)
    assert whole.path.read_bytes() == parts.path.read_bytes()
    assert not any("tun" in file.name for file in (tmp_path / "parts").iterdir())


def test_best_effort_of_a_k_quant(wide_gguf: Path, tmp_path: Path) -> None:
    options = {"sweeps": 1, "learn_batch": 2}
    made = quantized(wide_gguf, tmp_path / "m.gguf", "q4_k_m", effort="best", num_samples=8, options=options)
    recipe = made.record["recipe"]
    assert recipe["options"] == {"learn_steps": 100, "fit_types": True, **options, "refine": "hessian"}
    assert recipe["tune"]["steps"] > 0
    assert recipe["calibration"]["dataset"] == "pydoc+self"
    assert made.record["tuning"]["after"] <= made.record["tuning"]["before"]


def test_tuning_without_second_order_is_refused(wide_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="second-order"):
        quantized(wide_gguf, tmp_path / "m.gguf", "q4_k_m", tune_steps=4, options={"refine": "none"})
