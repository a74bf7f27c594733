"""lowbit fit: which type every tensor of a GGUF file should have, so that a number of bytes costs the least divergence.

One calibration pass gives the Gram matrix of every layer's inputs, one pass back how much its outputs matter; every tensor
is rounded to every type and priced (lowbit.pipeline.sensitivity), and the knapsack is solved (lowbit.recommend.allocate).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.api.gguf_conversion import converted
from lowbit.api.gguf_options import gguf_recipe
from lowbit.api.gguf_source import opened
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.core.errors import RecipeError
from lowbit.core.ggml_types import ggml_type
from lowbit.core.hardware import calibration_dtype, pick_device
from lowbit.core.progress import Progress, Silent
from lowbit.core.scheme import DTYPES
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.text import token_windows
from lowbit.core.tokenizer import load_tokenizer
from lowbit.methods.kquants import decode, encode
from lowbit.methods.kquants.policy import ModelInfo, TensorInfo, tensor_types
from lowbit.pipeline.gguf_names import linear_tensors
from lowbit.pipeline.gguf_stream import advance, embedded, head_statistics, statistics_of
from lowbit.pipeline.run import Streams
from lowbit.pipeline.sensitivity import Sensitivity, output_sensitivity, price
from lowbit.recipe import Calibration, Recipe
from lowbit.recommend.allocate import Allocation, Choice, allocate

_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
# for rows that are no multiple of 256
_SMALL_BLOCKS = ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# rows of a matrix that are priced: the others are taken to be like them
_PRICED_ROWS = 512
# windows of the pass back: gradients are averaged over all of their tokens
GRADIENT_WINDOWS = 8
_BASE = "q4_k_m"


@dataclass(frozen=True)
class Fit:
    """recipe: what `lowbit quantize` runs. nbytes: of the file. kl: predicted, of rounding with an importance matrix (the
    second-order rounding of the recipe does better); bound: no allocation within the budget is predicted to cost less.
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
        parts = _Prices(streamed, source, windows, progress).all()
        fixed = source.location.stat().st_size - sum(source.tensors[name].nbytes for name in parts)
        policies = {
            name: _policy(source, name) for name in dict.fromkeys([like or _BASE, "q3_k_s", "q4_k_m", "q5_k_m"])
        }
    budget = fixed + sum(_bytes(source, name, policies[like][name]) for name in parts) if like else size
    if budget is None:
        raise RecipeError("fit needs a number of bytes", hint="--size 100MiB, --like q4_k_m or --max-memory 6GiB")
    best = allocate(parts, budget - fixed)
    known = {name: _of_policy(parts, types, fixed) for name, types in policies.items()}
    return Fit(
        _recipe(best, text), fixed + best.nbytes, best.cost, best.bound,
        {name: value for name, value in known.items() if value}, best.chosen,
    )  # fmt: skip


class _Prices:
    """The choices of every matrix of the file, with their bytes and predicted divergence."""

    def __init__(self, model: StreamedModel, source: GgufSource, windows: Tensor, progress: Progress) -> None:
        self.model, self.source, self.windows, self.progress = model, source, windows, progress
        self.linears = linear_tensors(model, source)
        self.parts: dict[str, list[Choice]] = {}

    def all(self) -> dict[str, list[Choice]]:
        model = self.model
        found = output_sensitivity(model, self.windows[:GRADIENT_WINDOWS], self.progress)
        self.progress.start("price", len(model.blocks) + 1)
        states = embedded(model, self.windows, Streams(4096, 2**40, Path(tempfile.gettempdir())))
        for index in range(len(model.blocks)):
            with torch.no_grad(), model.block(index) as module:
                for group in model.architecture.linears:
                    own = [linear for linear in self.linears.values() if linear.block == index and linear.name in group]
                    if not own:
                        continue
                    gram = statistics_of(model, index, module, own[0].name, states).gram
                    assert gram is not None
                    for linear in own:
                        weight = module.get_submodule(linear.name).get_parameter("weight").float()
                        weight = weight.T if model.architecture.transposed else weight
                        self._add(linear.tensor, weight, gram, found.layers[linear.path])
                advance(model, index, module, states)
            self.progress.advance()
        self._outside(found, head_statistics(model, states).gram)
        self.progress.advance()
        return self.parts

    def _outside(self, found: Sensitivity, gram: Tensor | None) -> None:
        """The head, and the embedding: a tied one is both."""
        assert gram is not None
        assert found.head is not None
        assert found.embedding is not None
        device = self.model.device
        table = self.source.dense("token_embd.weight").to(device)
        often = torch.bincount(self.windows.flatten(), minlength=len(table)).to(device) / self.windows.numel()
        tied = "output.weight" not in self.source.tensors
        if not tied:
            self._add("output.weight", self.source.dense("output.weight").to(device), gram, found.head)
        # an embedding row's error reaches the model whenever its token occurs, column by column
        self._add("token_embd.weight", table, gram if tied else None, found.head, (found.embedding, often))

    def _add(
        self,
        tensor: str,
        weight: Tensor,
        gram: Tensor | None,
        sensitivity: Tensor,
        embedding: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        rows = priced_rows(weight)
        part, share = weight[rows].contiguous(), len(weight) / len(rows)
        importance = None if gram is None else gram.diagonal().contiguous()
        columns = weight.shape[1]
        choices = []
        for name in _TYPES if columns % 256 == 0 else _SMALL_BLOCKS:
            rounded = decode(name, encode(name, part, importance), columns).to(part.device)
            cost = 0.0 if gram is None else price(part, rounded, gram, sensitivity[rows] * share)
            if embedding is not None:
                errors = (part - rounded).square() @ embedding[0]
                cost += 0.5 * (errors * _typical(embedding[1], rows)).sum().item()
            choices.append(Choice(name, _bytes(self.source, tensor, name), cost))
        self.parts[tensor] = choices


def priced_rows(weight: Tensor) -> Tensor:
    """Indices of the rows that stand for all rows of a matrix; every one of them counts for `len(weight) / len(rows)`."""
    shuffled = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))
    return shuffled[:_PRICED_ROWS].to(weight.device)


def _typical(often: Tensor, rows: Tensor) -> Tensor:
    """How often each row's token occurs, scaled so that the chosen rows stand for all of the text."""
    chosen = often[rows]
    return chosen / chosen.sum() if chosen.sum() > 0 else torch.full_like(chosen, 1 / len(chosen))


def _bytes(source: GgufSource, tensor: str, type_name: str) -> int:
    shape = source.tensors[tensor].shape
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows * ggml_type(type_name).row_bytes(shape[-1])


def _policy(source: GgufSource, name: str) -> dict[str, str]:
    tensors = [TensorInfo(tensor, spec.shape, spec.ggml_type) for tensor, spec in source.tensors.items()]
    heads = source.number("attention.head_count")
    info = ModelInfo(
        source.architecture,
        source.number("block_count"),
        heads,
        source.number("attention.head_count_kv", heads),
        source.number("expert_count"),
    )
    return tensor_types(name, tensors, info)


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
