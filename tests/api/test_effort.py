"""What the effort levels stand for, and where training takes more steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowbit.api.effort import resolved, with_effort, with_trained_codes
from lowbit.api.quantize import recipe_for
from lowbit.core.errors import RecipeError


def test_balanced_is_the_preset_and_fast_does_less() -> None:
    recipe = recipe_for("gptq")
    assert with_effort(recipe, "balanced") == recipe
    assert with_effort(recipe, "fast").options["asymmetric"] == 0


@pytest.mark.parametrize("method", ["rtn", "gptq", "autoround", "mxfp4", "nvfp4"])
def test_best_trains_blocks_and_scales_on_all_of_the_text_and_as_much_of_the_models_own(method: str) -> None:
    recipe = recipe_for(method).updated(dataset="pydoc", num_samples=100)
    few, many = with_effort(recipe, "best"), with_effort(recipe, "best", many_steps=True)
    for one in (few, many):
        assert one.method == "autoround"
        assert (one.calibration.dataset, one.calibration.num_samples) == ("pydoc+self", 200)
    assert many.tune.steps == 3 * few.tune.steps > 0
    assert many.options["steps"] == 3 * few.options["steps"] > 0


def test_k_quants_learn_and_train_longer_where_steps_are_quick() -> None:
    recipe = recipe_for("q4_k_m").updated(dataset="pydoc", num_samples=100)
    few, many = with_effort(recipe, "best"), with_effort(recipe, "best", many_steps=True)
    for one in (few, many):
        assert (one.calibration.dataset, one.calibration.num_samples) == ("pydoc+self", 200)
        assert one.options["fit_types"] is True
    assert many.options["learn_steps"] == 3 * few.options["learn_steps"] > 0
    assert many.tune == few.tune, "of scales alone more steps lose what fewer gain"
    longer, usual = with_trained_codes(many, many_steps=True).tune, with_trained_codes(few).tune
    assert longer.steps > 2 * usual.steps
    # text in proportion: the same windows again and again would be fitted, not learnt from
    assert longer.steps / longer.self_samples < 1.2 * usual.steps / usual.self_samples
    assert longer.model_copy(update={"steps": usual.steps, "self_samples": usual.self_samples}) == usual


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
    codes = resolved(recipe, "best", model, "auto", tune_codes=True).tune
    assert codes == with_trained_codes(recipe, many_steps=many).tune
    assert resolved(recipe, "fast", model, "auto") == with_effort(recipe, "fast")


@pytest.mark.parametrize(("method", "effort"), [("gptq", "most"), ("fp8", "best")])
def test_what_means_nothing_is_refused(method: str, effort: str) -> None:
    with pytest.raises(RecipeError):
        with_effort(recipe_for(method), effort)
