"""lowbit fit for directories of safetensors: how many bits every group of linear layers gets, within a number of bytes.

As lowbit.api.fit does for GGUF, with GPTQ's own rounding in the price. Layers that share their inputs (q, k and v; gate and
up) get the same numbers, since runtimes fuse them into one matrix.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.api.fit import Fit
from lowbit.api.gguf_types import priced_rows
from lowbit.api.quantize import recipe_for
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import RecipeError
from lowbit.core.hardware import calibration_dtype, pick_device
from lowbit.core.progress import Progress, Silent
from lowbit.core.scheme import DTYPES, WeightScheme
from lowbit.core.statistics import InputStatistics
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.text import token_windows
from lowbit.core.tokenizer import load_tokenizer
from lowbit.methods import METHODS
from lowbit.pipeline.gguf_stream import advance, embedded, statistics_of
from lowbit.pipeline.plan import Plan, make_plan
from lowbit.pipeline.run import Streams
from lowbit.pipeline.sensitivity import GRADIENT_WINDOWS, output_sensitivity, price
from lowbit.recipe import Calibration, Override, Recipe
from lowbit.recommend.allocate import Choice, allocate

_LEFT = "16 bits"
_EVERY = 4  # of so many windows one is held out


@dataclass(frozen=True)
class _Numbers:
    """What a group of layers may become: bits, and columns that share a scale (0: a scale a row)."""

    bits: int
    group_size: int

    @property
    def name(self) -> str:
        return f"{self.bits} bits g{self.group_size}" if self.group_size else f"{self.bits} bits by row"


def fit_layers(
    model: str | Path,
    *,
    size: int | None = None,
    like: str | None = None,
    format: str = "compressed-tensors",
    calibration: Calibration | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Fit:
    """Numbers for an artifact of at most `size` bytes of tensors, or of the size that the preset `like` ("gptq") would have.

    Every group of layers becomes 4 bits in groups of 32 or of the largest size that divides all layers, 8 bits by row, or
    stays in 16. Raises RecipeError when nothing is small enough, FormatError when the format cannot mix.
    """
    text = calibration or Calibration(dataset="pydoc", num_samples=32, seq_len=512)
    progress = progress or Silent()
    checkpoint, where = open_checkpoint(model), pick_device(device)
    stored = DTYPES.get(str(checkpoint.config.get("dtype")), torch.bfloat16)
    streamed = StreamedModel(checkpoint, where, calibration_dtype(where, stored))
    base = recipe_for("gptq").updated(group_size="auto", format=format, **text.model_dump())
    if like is not None:
        size = make_plan(_like(like, format), streamed).nbytes
    if size is None:
        raise RecipeError("fit needs a number of bytes", hint="--size 4GiB, --like gptq or --max-memory 6GiB")
    plans = {numbers: make_plan(_uniform(base, numbers), streamed) for numbers in _candidates(base, streamed)}
    windows = token_windows(text.dataset, load_tokenizer(checkpoint), text.num_samples, text.seq_len, text.seed)
    parts = _prices(streamed, windows, plans, progress)
    some = next(iter(plans.values()))
    fixed = some.nbytes - sum(_stored_bytes(some, group) for group in parts)
    best = allocate({",".join(group): choices for group, choices in parts.items()}, size - fixed)
    known = {
        numbers.name: (plan.nbytes, sum(_named(choices, numbers.name).cost for choices in parts.values()))
        for numbers, plan in plans.items()
    }
    recipe = _recipe(base, best.chosen, list(plans))
    nbytes = make_plan(recipe, streamed).nbytes
    types = {path: name for group, name in best.chosen.items() for path in group.split(",")}
    return Fit(recipe, nbytes, best.cost, best.bound, known, types)


def _like(name: str, format: str) -> Recipe:
    recipe = recipe_for(name)
    return recipe.updated(format=format, group_size="auto" if recipe.group_size else None)


def _candidates(base: Recipe, model: StreamedModel) -> list[_Numbers]:
    """The first is what the recipe says of all layers."""
    plan = make_plan(base, model)
    weights = next(iter(plan.layers.values())).scheme.weights
    assert weights is not None
    small = [] if weights.group_size in (0, 32) else [_Numbers(4, 32)]
    return [_Numbers(4, weights.group_size), *small, _Numbers(8, 0)]


def _uniform(base: Recipe, numbers: _Numbers) -> Recipe:
    return base.updated(bits=numbers.bits, group_size=numbers.group_size)


def _prices(
    model: StreamedModel, windows: Tensor, plans: Mapping[_Numbers, Plan], progress: Progress
) -> dict[tuple[str, ...], list[Choice]]:
    """The choices of every group of layers, by their paths, with their bytes and predicted divergence."""
    found = output_sensitivity(model, windows[:GRADIENT_WINDOWS], progress)
    planned = next(iter(plans.values())).layers
    progress.start("price", len(model.blocks))
    parts: dict[tuple[str, ...], list[Choice]] = {}
    streams = [
        embedded(model, part, Streams(4096, 2**40, Path(tempfile.gettempdir()))) for part in _learned_and_held(windows)
    ]
    for index in range(len(model.blocks)):
        path = model.block_path(index)
        with torch.no_grad(), model.block(index) as module:
            for group in model.architecture.linears:
                names = [name for name in group if f"{path}.{name}" in planned]
                if not names:
                    continue
                learned, held = (statistics_of(model, index, module, names[0], states) for states in streams)
                weights = {}
                for name in names:
                    weight = module.get_submodule(name).get_parameter("weight").float()
                    weights[f"{path}.{name}"] = weight.T if model.architecture.transposed else weight
                parts[tuple(weights)] = _choices(weights, learned, held, found.layers, plans)
            for states in streams:
                advance(model, index, module, states)
        progress.advance()
    return parts


def _learned_and_held(windows: Tensor) -> tuple[Tensor, Tensor]:
    """What GPTQ rounds by, and what its rounding is priced on: on its own text it looks better than it is."""
    held = torch.arange(len(windows)) % _EVERY == _EVERY - 1
    return (windows[~held], windows[held]) if held.any() else (windows, windows)


def _choices(
    weights: Mapping[str, Tensor],
    learned: InputStatistics,
    held: InputStatistics,
    sensitivity: Mapping[str, Tensor],
    plans: Mapping[_Numbers, Plan],
) -> list[Choice]:
    parts, matters = [], []
    for path, weight in weights.items():
        rows = priced_rows(weight)
        parts.append(weight[rows])
        matters.append(sensitivity[path][rows] * (len(weight) / len(rows)))
    # rows are independent and the inputs are shared: one factorization serves all layers of the group
    stacked, matter = torch.cat(parts), torch.cat(matters)
    choices = [Choice(_LEFT, sum(2 * weight.numel() for weight in weights.values()), 0.0)]
    for numbers, plan in plans.items():
        scheme = plan.layers[next(iter(weights))].scheme.weights
        assert scheme is not None
        cost = _cost(stacked, learned, held, scheme, matter)
        choices.append(Choice(numbers.name, _stored_bytes(plan, tuple(weights)), cost))
    return choices


def _cost(
    weight: Tensor, learned: InputStatistics, held: InputStatistics, scheme: WeightScheme, sensitivity: Tensor
) -> float:
    """Nats a token that GPTQ's rounding of these rows costs."""
    assert learned.gram is not None
    assert held.gram is not None
    method = METHODS.get("gptq")
    given = copy.copy(learned)
    given.gram = learned.gram.clone()  # the method may change what it is given
    options = method.options(asymmetric=0.0, refine=0)
    tensor = method.quantize(weight, given, scheme, options, torch.float16).tensor
    return price(weight, tensor.dequantize(torch.float32), held.gram, sensitivity)


def _stored_bytes(plan: Plan, group: tuple[str, ...]) -> int:
    assert plan.format is not None
    layers = [plan.layers[path] for path in group]
    layouts = [plan.format.layout(layer.scheme, layer.shape, plan.dtype) for layer in layers]
    return sum(spec.nbytes for layout in layouts for spec in layout.values())


def _named(choices: Sequence[Choice], name: str) -> Choice:
    return next(choice for choice in choices if choice.name == name)


def _recipe(base: Recipe, chosen: Mapping[str, str], candidates: Sequence[_Numbers]) -> Recipe:
    """The base recipe with one override for each kind of numbers that differs from its own."""
    usual = candidates[0]
    by_name = {numbers.name: numbers for numbers in candidates}
    groups: dict[str, list[str]] = {}
    for group, name in chosen.items():
        groups.setdefault(name, []).extend(group.split(","))
    patterns = {name: f"re:^({'|'.join(re.escape(path) for path in paths)})$" for name, paths in groups.items()}
    ignore = (*base.ignore, *([patterns.pop(_LEFT)] if _LEFT in patterns else []))
    overrides = [
        Override(match=pattern, bits=by_name[name].bits, group_size=by_name[name].group_size)
        for name, pattern in patterns.items()
        if name != usual.name
    ]
    recipe = _uniform(base, usual)
    return Recipe.parse(
        {**recipe.model_dump(), "ignore": ignore, "overrides": [override.model_dump() for override in overrides]}
    )
