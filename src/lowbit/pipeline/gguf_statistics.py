"""The importance matrix: squared inputs of every linear layer, summed over calibration text, in one pass of the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.core.progress import Progress
from lowbit.core.streamed_model import StreamedModel
from lowbit.formats.gguf_imatrix import Importance, ImportanceMatrix
from lowbit.pipeline.gguf_names import LinearTensor
from lowbit.pipeline.gguf_stream import advance, embedded
from lowbit.pipeline.run import Streams


class SquareSums:
    """Sums over tokens of squared inputs, float64 [in], by tensor name; and how many tokens there were."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, tensor: str, inputs: Tensor) -> None:
        """Inputs [..., in] of one batch."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        squares = rows.square().sum(0).double()
        self.sums[tensor] = self.sums[tensor] + squares if tensor in self.sums else squares
        self.tokens[tensor] = self.tokens.get(tensor, 0) + len(rows)

    def importance(self) -> dict[str, Importance]:
        """As the imatrix format has it."""
        return {
            name: Importance(sums.float().cpu()[None], torch.tensor([float(self.tokens[name])]))
            for name, sums in self.sums.items()
        }


def importance_matrix(
    model: StreamedModel,
    linears: Mapping[str, LinearTensor],
    windows: Tensor,
    dataset: str,
    streams: Streams,
    progress: Progress,
) -> ImportanceMatrix:
    """What llama-imatrix computes from the same token windows [chunks, chunk_size]: inputs of the unquantized model."""
    progress.start("imatrix", len(model.blocks))
    states = embedded(model, windows, streams)
    sums = SquareSums()
    for index in range(len(model.blocks)):
        own = {linear.name: linear.tensor for linear in linears.values() if linear.block == index}
        with torch.no_grad(), model.block(index) as module:

            def visit(name: str, inputs: Tensor, own: Mapping[str, str] = own) -> None:
                sums.add(own[name], inputs)

            advance(model, index, module, states, visit=visit, names=list(own))
        progress.advance()
    return ImportanceMatrix(sums.importance(), (dataset,), *map(int, windows.shape))
