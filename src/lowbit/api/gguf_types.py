"""Which type every tensor of a GGUF file should have, so that a number of bytes costs the least divergence.

One calibration pass gives the Gram matrix of every layer's inputs, one pass back how much its outputs matter; every tensor
is rounded to every type and priced as second-order rounding will leave it (lowbit.pipeline.sensitivity), and the knapsack is
solved (lowbit.recommend.allocate).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.core.ggml_types import ggml_type
from lowbit.core.progress import Progress
from lowbit.core.streamed_model import StreamedModel
from lowbit.methods.hessian import Factor
from lowbit.methods.kquants import decode, encode
from lowbit.methods.kquants.curvature import factor_gram
from lowbit.methods.kquants.policy import ModelInfo, PolicyOptions, TensorInfo, tensor_types
from lowbit.pipeline.gguf_names import LinearTensor, linear_tensors
from lowbit.pipeline.gguf_stream import embedded, grams_of, head_statistics
from lowbit.pipeline.run import Streams
from lowbit.pipeline.sensitivity import (
    GRADIENT_WINDOWS,
    PRICED_ROWS,
    PRICED_SMALL_BLOCKS,
    PRICED_TOKENS,
    PRICED_TYPES,
    Sensitivity,
    output_sensitivity,
    price_by_column,
)
from lowbit.pipeline.writer import write_json
from lowbit.recommend.allocate import Choice, allocate


def fitted_types(
    model: StreamedModel,
    source: GgufSource,
    windows: Tensor,
    types: Mapping[str, str],
    file: Path,
    progress: Progress,
) -> dict[str, str]:
    """The types of all tensors of a file no larger than with `types`, the matrices' as costs the least divergence; `types` as
    they are where those take less than any choice.

    windows: [samples, tokens]. file: JSON that keeps the answer for a continued run. Raises LowbitError subclasses.
    """
    if file.is_file():
        kept: dict[str, str] = json.loads(file.read_text())
        return kept
    priced = windows[: max(GRADIENT_WINDOWS, PRICED_TOKENS // windows.shape[1])]
    parts = Prices(model, source, priced, progress).all()
    room = sum(type_bytes(source, name, types[name]) for name in parts)
    found = dict(types)
    if sum(min(choice.nbytes for choice in choices) for choices in parts.values()) <= room:
        best = allocate(parts, room)
        found |= best.chosen
        progress.note(f"types of {len(parts)} tensors fitted to {room / 2**20:.1f} MiB: predicted KL {best.cost:.4f}")
    write_json(file, found)
    return found


class Prices:
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
            groups = [own for group in model.architecture.linears if (own := self._of(index, group))]
            with torch.no_grad(), model.block(index) as module:
                grams = grams_of(model, index, module, [own[0].name for own in groups], states)
                for own in groups:
                    factored = factor_gram(grams.pop(own[0].name)).factored
                    for linear in own:
                        weight = module.get_submodule(linear.name).get_parameter("weight").float()
                        weight = weight.T if model.architecture.transposed else weight
                        self._add(linear.tensor, weight, factored, found.layers[linear.path])
            self.progress.advance()
        self._outside(found, head_statistics(model, states).gram)
        self.progress.advance()
        return self.parts

    def _of(self, index: int, group: Sequence[str]) -> list[LinearTensor]:
        """The layers of a block that share an input."""
        return [linear for linear in self.linears.values() if linear.block == index and linear.name in group]

    def _outside(self, found: Sensitivity, gram: Tensor | None) -> None:
        """The head, and the embedding: a tied one is both."""
        assert gram is not None
        assert found.head is not None
        assert found.embedding is not None
        device = self.model.device
        table = self.source.dense("token_embd.weight").to(device)
        often = torch.bincount(self.windows.flatten(), minlength=len(table)).to(device) / self.windows.numel()
        tied, factored = "output.weight" not in self.source.tensors, factor_gram(gram).factored
        if not tied:
            self._add("output.weight", self.source.dense("output.weight").to(device), factored, found.head)
        # an embedding row's error reaches the model whenever its token occurs, column by column
        self._add("token_embd.weight", table, factored if tied else None, found.head, (found.embedding, often))

    def _add(
        self,
        tensor: str,
        weight: Tensor,
        factored: Factor | None,
        sensitivity: Tensor,
        embedding: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        rows = priced_rows(weight)
        part, share = weight[rows].contiguous(), len(weight) / len(rows)
        # as second-order rounding itself has it for its choice of scales
        importance = None if factored is None else factored.cost
        matters = []  # what errors cost, by column and by row: as a matrix of products, and as rows that are looked up
        if factored is not None:
            matters.append((factored.cost_in_text(), sensitivity[rows] * share))
        if embedding is not None:
            matters.append((embedding[0], _typical(embedding[1], rows)))
        columns = weight.shape[1]
        choices = []
        for name in PRICED_TYPES if columns % 256 == 0 else PRICED_SMALL_BLOCKS:
            rounded = decode(name, encode(name, part, importance), columns).to(part.device)
            cost = sum(price_by_column(part, rounded, *each) for each in matters)
            choices.append(Choice(name, type_bytes(self.source, tensor, name), cost))
        self.parts[tensor] = choices


def priced_rows(weight: Tensor) -> Tensor:
    """Indices of the rows that stand for all rows of a matrix; every one of them counts for `len(weight) / len(rows)`."""
    shuffled = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))
    return shuffled[:PRICED_ROWS].to(weight.device)


def _typical(often: Tensor, rows: Tensor) -> Tensor:
    """How often each row's token occurs, scaled so that the chosen rows stand for all of the text."""
    chosen = often[rows]
    return chosen / chosen.sum() if chosen.sum() > 0 else torch.full_like(chosen, 1 / len(chosen))


def type_bytes(source: GgufSource, tensor: str, type_name: str) -> int:
    """What a tensor takes in a type."""
    shape = source.tensors[tensor].shape
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows * ggml_type(type_name).row_bytes(shape[-1])


def file_types(source: GgufSource, name: str, options: PolicyOptions | None = None) -> dict[str, str]:
    """Every tensor's type in a file of type `name`, as llama-quantize has it."""
    tensors = [TensorInfo(tensor, spec.shape, spec.ggml_type) for tensor, spec in source.tensors.items()]
    heads = source.number("attention.head_count")
    info = ModelInfo(
        source.architecture,
        source.number("block_count"),
        heads,
        source.number("attention.head_count_kv", heads),
        source.number("expert_count"),
    )
    return tensor_types(name, tensors, info, options or PolicyOptions())
