"""One decoder block in the pipeline's hands: what is known of it, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowbit.core.distributed import ALONE, World
from lowbit.core.qtensor import QTensor
from lowbit.core.streamed_model import StreamedModel
from lowbit.pipeline.passage import Passage
from lowbit.pipeline.plan import LayerPlan, TransformPlan

ScaleDtype = Callable[[LayerPlan], torch.dtype]


@dataclass
class BlockResult:
    """The numbers of a block's layers by module path, their relative errors, and what the methods had to say.

    weights: all of the block's tensors by name within it, as the transforms left them.
    """

    weights: Mapping[str, Tensor]
    tensors: dict[str, QTensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class BlockJob:
    """A block with its weights as stored, the layers to quantize in it, and the calibration states before it.

    weights: by name within the block; transforms replace them. arriving: the hidden states that come out of the quantized
    prefix on their way through the block; None without calibration. original: those of the unquantized model, through
    the block as it was, when a method compares.
    world: the processes that share the windows and the rows.
    """

    model: StreamedModel
    index: int
    module: nn.Module
    weights: Mapping[str, Tensor]
    layers: Mapping[str, LayerPlan]
    arriving: Passage | None
    original: Passage | None
    scale_dtype: ScaleDtype
    transforms: Sequence[TransformPlan] = ()
    world: World = ALONE

    @property
    def path(self) -> str:
        """Module path of the block."""
        return self.model.block_path(self.index)

    def matrix(self, name: str) -> Tensor:
        """The weight [out, in] float32 of one of the block's linear layers."""
        weight = self.weights[f"{name}.weight"].float()
        return weight.T.contiguous() if self.model.architecture.transposed else weight

    def columns(self, name: str) -> int:
        """Inputs of one of the block's linear layers."""
        rows, columns = self.weights[f"{name}.weight"].shape
        return int(rows if self.model.architecture.transposed else columns)

    def groups(self) -> list[list[str]]:
        """Names of the layers to quantize, by shared input, in order of execution."""
        planned = [
            [name for name in group if f"{self.path}.{name}" in self.layers]
            for group in self.model.architecture.linears
        ]
        return [group for group in planned if group]


def place_weight(model: StreamedModel, module: nn.Module, name: str, dense: Tensor) -> None:
    """Give a linear layer of the block the weight [out, in] that a runtime will compute with."""
    linear = module.get_submodule(name)
    oriented = dense.T if model.architecture.transposed else dense
    linear.weight = nn.Parameter(oriented.to(model.dtype).contiguous(), requires_grad=False)
