"""What the effort levels stand for, on a CPU and on a GPU."""

from pathlib import Path

import pytest
import torch

from lowbit.api.effort import resolved, with_effort
from lowbit.api.quantize import recipe_for
from lowbit.core.errors import RecipeError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_balanced_is_the_preset_and_fast_does_less() -> None:
    recipe = recipe_for("gptq")
    assert with_effort(recipe, "balanced", GPU) == recipe
    assert with_effort(recipe, "fast", GPU).options["asymmetric"] == 0


@pytest.mark.parametrize("method", ["rtn", "gptq", "autoround"])
def test_best_trains_blocks_and_scales_on_all_of_the_text_and_as_much_of_the_models_own(method: str) -> None:
    recipe = recipe_for(method).updated(dataset="pydoc", num_samples=100)
    best = {place: with_effort(recipe, "best", place) for place in (CPU, GPU)}
    for one in best.values():
        assert one.method == "autoround"
        assert (one.calibration.dataset, one.calibration.num_samples) == ("pydoc+self", 200)
    assert best[GPU].tune.steps == 3 * best[CPU].tune.steps > 0
    assert best[GPU].options["steps"] == 3 * best[CPU].options["steps"] > 0


def test_what_was_named_stays() -> None:
    recipe = recipe_for("autoround").updated(options={"steps": 7}, dataset="pydoc+self", num_samples=10)
    best = with_effort(recipe, "best", GPU)
    assert best.options["steps"] == 7
    assert best.calibration == recipe.calibration


def test_a_run_takes_the_steps_of_its_device(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # there may be no GPU here: its name stands in for it
    monkeypatch.setattr("lowbit.api.effort.pick_device", lambda _: GPU)
    recipe = recipe_for("gptq").updated(dataset="pydoc")
    assert resolved(recipe, "best", tiny_llama, "auto") == with_effort(recipe, "best", GPU)
    assert resolved(recipe, "best", tiny_llama, "auto", tune_steps=5).tune.steps == 5


@pytest.mark.parametrize(("method", "effort"), [("gptq", "most"), ("fp8", "best")])
def test_what_means_nothing_is_refused(method: str, effort: str) -> None:
    with pytest.raises(RecipeError):
        with_effort(recipe_for(method), effort, CPU)
