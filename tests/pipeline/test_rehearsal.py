"""What is done once on random numbers while text is cut: each kind of layer, and nothing that the run would notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.api.quantize import plan
from lowbit.core.contracts import Quantized
from lowbit.core.errors import CalibrationError
from lowbit.core.scheme import WeightScheme
from lowbit.core.statistics import InputStatistics
from lowbit.pipeline.plan import Plan
from lowbit.pipeline.rehearsal import rehearse, rehearsing
from lowbit.recipe import Recipe, preset, preset_names

CPU = torch.device("cpu")


def watched(model: Path, see: Callable[..., None], **changes: Any) -> Plan:
    """The plan of GPTQ whose method tells `see` what it is given."""
    found, _ = plan(model, recipe=preset("gptq").updated(group_size=32, dataset="pydoc", **changes))

    def layer(one: Any) -> Any:
        def quantize(*arguments: Any) -> Quantized:
            see(*arguments)
            return one.method.quantize(*arguments)

        return replace(one, method=replace(one.method, quantize=quantize))

    return replace(found, layers={path: layer(one) for path, one in found.layers.items()})


def test_every_kind_is_rehearsed_once_with_what_it_asks_for(tiny_llama: Path) -> None:
    given: list[tuple[int, int, bool]] = []

    def see(weight: Tensor, statistics: InputStatistics, scheme: WeightScheme, *_: Any) -> None:
        assert weight.isfinite().all()
        asked = statistics.gram is not None and statistics.cross is not None
        given.append((scheme.bits, weight.shape[1], asked))

    overrides = [{"match": "*.down_proj", "bits": 8}]
    found = watched(tiny_llama, see, overrides=overrides)
    state = torch.random.get_rng_state()
    rehearsing(found, CPU, torch.float32).result()
    assert torch.equal(torch.random.get_rng_state(), state), "the run would draw other numbers"
    narrow, wide = (found.layers[f"model.layers.0.{name}"].shape[1] for name in ("self_attn.q_proj", "mlp.down_proj"))
    assert sorted(given) == [(4, narrow, True), (8, wide, True)]


def test_what_fails_in_it_is_left_to_the_run(tiny_llama: Path) -> None:
    def fail(*_: Any) -> None:
        raise CalibrationError("not positive definite", hint="")

    rehearse(watched(tiny_llama, fail), CPU, torch.float32)

    def break_(*_: Any) -> None:
        raise AssertionError("a mistake")

    with pytest.raises(AssertionError, match="a mistake"):
        rehearse(watched(tiny_llama, break_), CPU, torch.float32)


def test_nothing_is_rehearsed_without_calibration(tiny_llama: Path) -> None:
    found, _ = plan(tiny_llama, recipe=preset("rtn").updated(group_size=32))

    def never(*_: Any) -> Quantized:
        raise AssertionError("there is nothing to wait for")

    layers = {path: replace(one, method=replace(one.method, quantize=never)) for path, one in found.layers.items()}
    rehearse(replace(found, layers=layers), CPU, torch.float32)


@pytest.mark.parametrize("name", preset_names())
def test_it_stands_in_no_preset_way(tiny_llama: Path, name: str) -> None:
    found, _ = plan(tiny_llama, recipe=with_small_groups(preset(name)))
    rehearse(found, CPU, torch.float32)


def with_small_groups(recipe: Recipe) -> Recipe:
    return recipe.updated(group_size=32) if recipe.group_size not in (None, 0, 16, 32) else recipe
