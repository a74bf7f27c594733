"""Learned rounding of GGUF files: bytes that stand for less divergence, the same after a crash, rows where they belong."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import lowbit
from lowbit.api.run import Settings
from lowbit.core.errors import RecipeError
from lowbit.core.progress import Silent
from lowbit.methods.kquants.codec import CODECS
from tests.interrupted import StopAt

# damped so far that second-order rounding only rounds to nearest: a start that leaves something to learn
ROUGH: dict[str, Any] = {"sweeps": 0, "damping": 100.0, "asymmetric": 0}
LEARNING: dict[str, Any] = {"learn_steps": 30, "learn_batch": 4, "learn_reach": 1.0}


class Notes(Silent):
    """What was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def quantized(source: Path, output: Path, method: str, options: dict[str, Any], **changes: Any) -> Any:
    text = {"dataset": "pydoc", "num_samples": 24, "seq_len": 64}
    settings = Settings(verify=False, device="cpu")
    return lowbit.quantize(
        source, output=output, method=method, settings=settings, options=options, **{**text, **changes}
    )


@pytest.mark.parametrize("method", ["q3_k_s", "q2_k"])
def test_learned_rounding_lowers_the_divergence(wide_llama: Path, wide_gguf: Path, tmp_path: Path, method: str) -> None:
    """Its rows are moved for rope in the file and must be moved back for the block, or nothing would be learned."""
    notes = Notes()
    made = [
        quantized(wide_gguf, tmp_path / "0.gguf", method, ROUGH),
        quantized(wide_gguf, tmp_path / "1.gguf", method, ROUGH | LEARNING, progress=notes),
    ]
    kl = [lowbit.evaluate(one.path, base=wide_llama, dataset="pydoc", windows=16, context=64).kl for one in made]
    assert kl[1] < 0.95 * kl[0]
    assert sum("held-out loss" in note for note in notes.notes) == 2
    assert not any("kept the start" in warning for warning in notes.warnings)
    before, after = ({t.name: t for t in gguf.GGUFReader(one.path).tensors} for one in made)
    for name, old in before.items():
        assert old.tensor_type == after[name].tensor_type
        kind = old.tensor_type.name
        if not name.startswith("blk.") or kind not in CODECS:
            continue
        start, end = (CODECS[kind].unpack(torch.tensor(each[name].data)) for each in (before, after))
        assert not torch.equal(start[1], end[1]), name
        if name.startswith("blk.0"):  # later blocks are fed by others
            assert start[0].scale_codes is not None
            assert torch.equal(start[0].scale_codes, end[0].scale_codes)
            codes = (start[1].float() - end[1].float()).abs()
            assert codes.max() <= 3
            assert (codes > 0).float().mean() < 0.6


def test_a_run_that_was_cut_off_gives_the_same_bytes(wide_gguf: Path, tmp_path: Path) -> None:
    options = {"sweeps": 1, "learn_steps": 4}
    quantized(wide_gguf, tmp_path / "a" / "m.gguf", "q4_k_m", options)
    with pytest.raises(KeyboardInterrupt):
        quantized(wide_gguf, tmp_path / "b" / "m.gguf", "q4_k_m", options, progress=StopAt("quantize", 1))
    resumed = quantized(wide_gguf, tmp_path / "b" / "m.gguf", "q4_k_m", options)
    assert resumed.run["resumed_blocks"] > 0
    assert (tmp_path / "a" / "m.gguf").read_bytes() == (tmp_path / "b" / "m.gguf").read_bytes()


def test_a_block_that_did_not_gain_keeps_its_start_and_says_so(wide_gguf: Path, tmp_path: Path) -> None:
    notes = Notes()
    plain = quantized(wide_gguf, tmp_path / "0.gguf", "q4_k_m", {"sweeps": 1})
    # so far that nothing can come of it
    wild = {"learn_steps": 2, "learn_reach": 50.0, "learn_scale_reach": 0.0}
    kept = quantized(wide_gguf, tmp_path / "1.gguf", "q4_k_m", {"sweeps": 1} | wild, progress=notes)
    assert sum("kept the start" in warning for warning in notes.warnings) == 2
    tensors = [{t.name: t.data.tobytes() for t in gguf.GGUFReader(one.path).tensors} for one in (plain, kept)]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"learn_steps": -1}, "whole number of at least 0"),
        ({"learn_steps": "many"}, "whole number"),
        ({"learn_steps": 5, "learn_batch": 0}, "at least 1"),
        ({"learn_steps": 5, "learn_scale_reach": 2}, "from 0 to 0.99"),
        ({"learn_steps": 5, "refine": "none"}, "second-order"),
        ({"learn_step": 5}, "did you mean 'learn_steps'"),
    ],
)
def test_wrong_options_are_refused(wide_gguf: Path, tmp_path: Path, options: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        quantized(wide_gguf, tmp_path / "m.gguf", "q4_k_m", options)
    assert not list(tmp_path.iterdir())
