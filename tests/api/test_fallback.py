from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.api.fallback import next_better, quantize_with_fallback
from lowbit.api.quantize import recipe_for
from lowbit.api.run import Settings
from lowbit.core.errors import VerificationError
from lowbit.core.progress import Silent
from lowbit.evals.divergence import Measurement
from lowbit.evals.verify import check


@pytest.mark.parametrize(
    ("method", "ladder"),
    [
        ("q3_k_s", ["q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16"]),
        ("q4_0", ["q5_k_m", "q6_k", "q8_0", "f16"]),
        ("rtn", ["gptq 4", "gptq 8"]),
        ("nf4", ["bnb 8", "rtn 8"]),
        ("mxfp4", ["fp8 8"]),
        ("fp16", []),
    ],
)
def test_ladders_end(method: str, ladder: list[str]) -> None:
    recipe, found = recipe_for(method), []
    while (better := next_better(recipe)) is not None:
        found.append(better.method if better.format == "gguf" else f"{better.method} {better.bits}")
        recipe = better
    assert found == ladder


def test_calibration_is_kept() -> None:
    recipe = recipe_for("nvfp4").updated(dataset="text.txt", num_samples=3)
    better = next_better(recipe)
    assert better is not None
    assert better.calibration == recipe.calibration


def test_recovery_is_checked() -> None:
    measured = Measurement(1, 9, 9, perplexity=10.5, perplexity_error=0.1, base_perplexity=10.0, kl=0.02, top1=0.9)
    check(measured, {}, min_recovery=95.0)
    with pytest.raises(VerificationError, match=r"keeps 95.24%.*96% was asked"):
        check(measured, {"a": 0.1}, min_recovery=96.0)


class Told(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_tries_until_it_is_good_enough(tiny_llama: Path, tmp_path: Path) -> None:
    told = Told()
    recipe = recipe_for("rtn").updated(bits=2, group_size=64, dataset="pydoc", num_samples=4, seq_len=64)
    with pytest.raises(VerificationError):
        quantize_with_fallback(
            tiny_llama, output=tmp_path / "no", recipe=recipe, settings=Settings(max_kl=1e-9), progress=told
        )
    assert not (tmp_path / "no").exists()
    assert ["2-bit" in told.warnings[0], "gptq 3-bit" in told.warnings[1], len(told.warnings)] == [True, True, 4]
    result = quantize_with_fallback(
        tiny_llama, output=tmp_path / "yes", recipe=recipe, settings=Settings(max_kl=0.05), progress=told
    )
    assert result.record["recipe"]["bits"] > 2
    assert result.measurement is not None
    assert result.measurement["kl"] <= 0.05
