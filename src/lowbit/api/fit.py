"""lowbit fit: a recipe that names the type of every tensor of a GGUF file, for a number of bytes (gguf_types.py)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.api.gguf_conversion import converted
from lowbit.api.gguf_options import gguf_recipe
from lowbit.api.gguf_source import opened
from lowbit.api.gguf_types import Prices, file_types, type_bytes
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import RecipeError
from lowbit.core.hardware import calibration_dtype, pick_device
from lowbit.core.progress import Progress, Silent
from lowbit.core.scheme import DTYPES
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.text import token_windows
from lowbit.core.tokenizer import load_tokenizer
from lowbit.recipe import Calibration, Recipe
from lowbit.recommend.allocate import Allocation, Choice, allocate

_BASE = "q4_k_m"


@dataclass(frozen=True)
class Fit:
    """recipe: what `lowbit quantize` runs. nbytes: of the file. kl: predicted, of second-order rounding, without what errors
    of earlier blocks add; bound: no allocation within the budget is predicted to cost less.
    like: the same prediction for plain file types: name -> (bytes, kl)."""

    recipe: Recipe
    nbytes: int
    kl: float
    bound: float
    like: dict[str, tuple[int, float]]
    types: dict[str, str]


def fit(
    model: str | Path,
    *,
    size: int | None = None,
    like: str | None = None,
    calibration: Calibration | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Fit:
    """Types for a GGUF file of at most `size` bytes, or of the size that file type `like` would have.

    Raises RecipeError when no types are small enough, and whatever opening or converting the model raises.
    """
    text = calibration or Calibration(dataset="pydoc", num_samples=32, seq_len=512)
    progress = progress or Silent()
    with tempfile.TemporaryDirectory(prefix="lowbit-fit-") as work:
        from_gguf = Path(model).suffix == ".gguf"
        checkpoint = open_checkpoint(model)
        source = (
            opened(Path(model), allow_requantize=False) if from_gguf else converted(checkpoint, Path(work), progress)
        )
        where = pick_device(device)
        stored = DTYPES.get(str(checkpoint.config.get("dtype")), torch.bfloat16)
        streamed = StreamedModel(checkpoint, where, calibration_dtype(where, stored))
        windows = token_windows(text.dataset, load_tokenizer(checkpoint), text.num_samples, text.seq_len, text.seed)
        parts = Prices(streamed, source, windows, progress).all()
        fixed = source.location.stat().st_size - sum(source.tensors[name].nbytes for name in parts)
        policies = {
            name: file_types(source, name) for name in dict.fromkeys([like or _BASE, "q3_k_s", "q4_k_m", "q5_k_m"])
        }
    budget = fixed + sum(type_bytes(source, name, policies[like][name]) for name in parts) if like else size
    if budget is None:
        raise RecipeError("fit needs a number of bytes", hint="--size 100MiB, --like q4_k_m or --max-memory 6GiB")
    best = allocate(parts, budget - fixed)
    known = {name: _of_policy(parts, types, fixed) for name, types in policies.items()}
    return Fit(
        _recipe(best, text), fixed + best.nbytes, best.cost, best.bound,
        {name: value for name, value in known.items() if value}, best.chosen,
    )  # fmt: skip


def _of_policy(parts: Mapping[str, list[Choice]], types: Mapping[str, str], fixed: int) -> tuple[int, float] | None:
    """(bytes, predicted divergence) of a file type; None when it uses a type that was not priced."""
    nbytes, cost = fixed, 0.0
    for tensor, choices in parts.items():
        choice = next((choice for choice in choices if choice.name == types[tensor]), None)
        if choice is None:
            return None
        nbytes, cost = nbytes + choice.nbytes, cost + choice.cost
    return nbytes, cost


def _recipe(best: Allocation, text: Calibration) -> Recipe:
    """A GGUF recipe that names every tensor's type; neighbours with the same type share a line."""
    options: dict[str, object] = {}
    by_type: dict[tuple[str, str], list[str]] = {}
    for tensor, name in best.chosen.items():
        if tensor == "token_embd.weight":
            options["token_embedding_type"] = name.lower()
        elif tensor == "output.weight":
            options["output_tensor_type"] = name.lower()
        else:
            _, block, kind = tensor.removesuffix(".weight").split(".", 2)
            by_type.setdefault((kind, name), []).append(block)
    options["tensor_type"] = [
        rf"^blk\.({'|'.join(blocks)})\.{kind}\.weight$={name.lower()}" for (kind, name), blocks in by_type.items()
    ]
    return gguf_recipe(_BASE).updated(options=options, **text.model_dump())
