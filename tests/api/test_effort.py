"""What the effort levels stand for, and where training takes more steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowbit.api.effort import resolved, with_effort
from lowbit.api.quantize import recipe_for
from lowbit.core.errors import RecipeError


def test_balanced_is_the_preset_and_fast_does_less() -> None:
    recipe = recipe_for("gptq")
    assert with_effort(recipe, "balanced") == recipe
    assert with_effort(recipe, "fast").options["asymmetric"] == 0


@pytest.mark.parametrize("method", ["rtn", "gptq", "autoround"])
def test_best_trains_blocks_and_scales_on_all_of_the_text_and_as_much_of_the_models_own(method: str) -> None:
    recipe = recipe_for(method).updated(dataset="pydoc", num_samples=100)
    few, many = with_effort(recipe, "best"), with_effort(recipe, "best", many_steps=True)
    for one in (few, many):
        assert one.method == "autoround"
        assert (one.calibration.dataset, one.calibration.num_samples) == ("pydoc+self", 200)
    assert many.tune.steps == 3 * few.tune.steps > 0
    assert many.options["steps"] == 3 * few.options["steps"] > 0


def test_what_was_named_stays() -> None:
    recipe = recipe_for("autoround").updated(options={"steps": 7}, dataset="pydoc+self", num_samples=10)
    best = with_effort(recipe, "best", many_steps=True)
    assert best.options["steps"] == 7
    assert best.calibration == recipe.calibration


@pytest.mark.parametrize(
    ("device", "small", "many"), [("cuda", 2**25, True), ("cuda", 2**10, False), ("cpu", 2**25, False)]
)
def test_small_models_on_a_gpu_take_many_steps(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, device: str, small: int, many: bool
) -> None:
    # there may be no GPU here: its name stands in for it; and what is small is made smaller instead of a model larger
    monkeypatch.setattr("lowbit.api.effort.pick_device", lambda _: torch.device(device))
    monkeypatch.setattr("lowbit.api.effort._SMALL_BLOCK", small)
    recipe = recipe_for("gptq").updated(dataset="pydoc")
    model = make_model()
    assert resolved(recipe, "best", model, "auto") == with_effort(recipe, "best", many_steps=many)
    assert resolved(recipe, "best", model, "auto", tune_steps=5).tune.steps == 5
    assert resolved(recipe, "fast", model, "auto") == with_effort(recipe, "fast")


@pytest.mark.parametrize(("method", "effort"), [("gptq", "most"), ("fp8", "best")])
def test_what_means_nothing_is_refused(method: str, effort: str) -> None:
    with pytest.raises(RecipeError):
        with_effort(recipe_for(method), effort)
