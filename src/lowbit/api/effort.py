"""Effort levels: one word for how much time accuracy is worth, resolved into plain fields of the recipe.

fast: no second stream of activations, no refinement. balanced: the presets as they are. best: as much text again is sampled
from the model itself, blocks are trained (autoround, in a GGUF file from second-order codes), and a last pass trains scales
and norms end to end. A k-quant's tensors get the types that cost the least divergence in a file no larger, and where a GPU has
room for them all codes are trained. Small models on a GPU train in two to three times as many steps. docs/accuracy.md has the
time and divergence of each.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch

from lowbit.api.gguf_options import NO_TEXT, names_types
from lowbit.api.last_pass import has_even_codes_of
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import RecipeError
from lowbit.core.ggml_types import file_type, ggml_type
from lowbit.core.hardware import memory_of, pick_device
from lowbit.core.streamed_model import StreamedModel
from lowbit.methods import METHODS
from lowbit.methods.learning import LearnOptions
from lowbit.pipeline.codes import memory_for_codes
from lowbit.recipe import Calibration, Recipe

Effort = Literal["fast", "balanced", "best"]
EFFORTS: tuple[Effort, ...] = ("fast", "balanced", "best")
# together they cost what AutoRound's 200 steps do; where launching kernels is most of a step, so many times as many do
_LEARN_STEPS, _TUNE_STEPS, _MANY = LearnOptions.steps, 64, 3
# weights of a block that a GPU computes with in less time than launching its kernels takes
_SMALL_BLOCK = 2**25
# smaller steps than elsewhere, and no more: a k-quant leaves less to gain, and larger ones lose it again
_GGUF_RATE = 1e-3
# of training codes: many small steps on much text (pipeline/codes.py)
_CODES = {"steps": 2200, "rate": 3e-4, "batch": 16, "codes": 8e-4, "self_samples": 4500}
_MANY_CODES = {**_CODES, "steps": 5000, "self_samples": 9000}
# share of a GPU's memory that training codes may take: states, logits and one block's graph are there too
_ROOM = 0.7
# what learned rounding can start from: the method's codes, or those that it chooses itself on the same grid
_LEARNABLE = ("rtn", "gptq", "autoround", "fp4")


def with_effort(recipe: Recipe, effort: str, *, many_steps: bool = False) -> Recipe:
    """The recipe at another effort. many_steps: whether steps of training are so quick that many more are no matter. Raises
    RecipeError for an unknown level, or one that means nothing for the method."""
    if effort not in EFFORTS:
        raise RecipeError(f"effort {effort!r} is unknown", hint=f"one of {', '.join(EFFORTS)}")
    if effort == "balanced":
        return recipe
    if effort == "fast":
        return recipe.updated(options={"asymmetric": 0, "refine": 0}) if recipe.method == "gptq" else recipe
    times = _MANY if many_steps else 1
    if recipe.format == "gguf" and ggml_type(file_type(recipe.method).default_type).quantized:
        return _best_gguf(recipe, times)
    if recipe.method not in _LEARNABLE:
        raise RecipeError(
            f"--effort best trains codes and scales, and method {recipe.method!r} in format {recipe.format!r} has none "
            "that it could",
            hint="--method rtn, gptq, autoround, mxfp4 or nvfp4, or a k-quant such as q4_k_m",
        )
    return Recipe.parse({
        **recipe.model_dump(), "method": "autoround",
        "options": {"steps": times * _LEARN_STEPS, **_options_for_training(recipe), "refine": 0},
        "tune": {"steps": times * _TUNE_STEPS}, "calibration": _with_self(recipe.calibration).model_dump(),
    })  # fmt: skip


def _options_for_training(recipe: Recipe) -> dict[str, Any]:
    """All that GPTQ has, from which autoround starts on integers; what another method calls its own, it has not."""
    if recipe.method in ("gptq", "autoround"):
        return recipe.options
    own = {field.name for field in fields(METHODS.get(recipe.method).options)}
    return {name: value for name, value in recipe.options.items() if name not in own}


def resolved(
    recipe: Recipe,
    effort: str,
    model: str | Path,
    device: str,
    revision: str | None = None,
    *,
    tune_steps: int | None = None,
    tune_codes: bool | None = None,
) -> Recipe:
    """The recipe at another effort. tune_steps: of the last pass; None: as the effort has it. tune_codes: whether that pass
    trains codes; None: at "best", unless its steps are named, those of a k-quant on a GPU large enough (whatever else is on
    it now: the same command has to give the same).

    Raises RecipeError as `with_effort` does, and whatever opening the model raises.
    """
    found, many_steps = with_effort(recipe, effort), False
    # the other levels are the same everywhere, and a process that only starts others must leave GPUs alone
    if effort == "best" and (place := pick_device(device)).type == "cuda":
        shapes = StreamedModel(open_checkpoint(model, revision=revision), torch.device("cpu"), torch.bfloat16)
        many_steps = _largest_block(shapes) <= _SMALL_BLOCK
        found = with_effort(recipe, effort, many_steps=many_steps)
        if tune_codes is None and tune_steps is None:
            tune_codes = _trains_codes(found, shapes, place)
    return (with_trained_codes(found, many_steps=many_steps) if tune_codes else found).updated(tune_steps=tune_steps)


def _largest_block(model: StreamedModel) -> int:
    return max(sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks)


def _trains_codes(recipe: Recipe, model: StreamedModel, device: torch.device) -> bool:
    has_codes = recipe.format == "gguf" and has_even_codes_of(recipe.method)
    return has_codes and memory_for_codes(model) < _ROOM * memory_of(device)


def with_trained_codes(recipe: Recipe, *, many_steps: bool = False) -> Recipe:
    """The recipe with codes trained in its last pass, mostly on text that the model writes for it. many_steps: as for
    `with_effort`."""
    return Recipe.parse({**recipe.model_dump(), "tune": _MANY_CODES if many_steps else _CODES})


def _best_gguf(recipe: Recipe, times: int) -> Recipe:
    text = recipe.calibration
    if text.dataset == NO_TEXT:
        text = text.model_copy(update={"dataset": Calibration().dataset})
    # a mixture is chosen for its size; a plain type (Q4_0, IQ4_NL) also for the kernels that it has
    mixture = "_K" in file_type(recipe.method).name and not names_types(recipe.options)
    chosen = {"learn_steps": times * _LEARN_STEPS, "fit_types": mixture, **recipe.options, "refine": "hessian"}
    return Recipe.parse({
        **recipe.model_dump(), "options": chosen,
        "tune": {"steps": _TUNE_STEPS, "rate": _GGUF_RATE}, "calibration": _with_self(text).model_dump(),
    })  # fmt: skip


def _with_self(text: Calibration) -> Calibration:
    """As many windows again, of the model's own text: fitting one text alone is what other text pays for."""
    if "self" in text.dataset.split("+"):
        return text
    return text.model_copy(update={"dataset": f"{text.dataset}+self", "num_samples": 2 * text.num_samples})
