"""What the last pass trains: a factor for every scale, minimum and norm weight, as one vector with its Adam moments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lowbit.core.primitives import are_consecutive, by_column
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.training import adam_
from lowbit.pipeline.writer import save_tensors

# of Adam's moments; the second forgets faster than usual since there are few steps
_FORGET = (0.9, 0.95)


class Factors:
    """values: float32, one for each scale [out, groups] and each weight of a norm, by block and parameter name; of a layer
    with minimums one for each scale and one for what multiplies the minimums, [2, out, groups].

    A scale becomes scale * (1 + value); a norm weight w becomes w + value * max(|w|, mean |w|), which also moves weights
    that are kept near zero (norms that multiply by 1 + w). file: where the training state is saved.
    """

    def __init__(
        self,
        artifact: StreamedModel,
        columns: Mapping[str, Tensor],
        file: Path,
        device: torch.device,
        minimums: Mapping[str, Tensor] | None = None,
    ) -> None:
        """columns: layer path -> [in] int64, the group of each input column. minimums: layer path -> [out, sub-blocks], what
        is taken off a weight beside its scale times its level; every group is a whole number of sub-blocks.

        Continues from `file` when it is there.
        """
        self.file = file
        self.columns = {path: groups.to(device) for path, groups in columns.items()}
        self._consecutive = {
            path: are_consecutive(groups, int(groups.max()) + 1) for path, groups in self.columns.items()
        }
        self.minimums = {path: minimum.to(device) for path, minimum in (minimums or {}).items()}
        self._places: list[dict[str, tuple[int, tuple[int, ...]]]] = []
        self._paths = [artifact.block_path(index) for index in range(len(artifact.blocks))]
        total = 0
        for path, block in zip(self._paths, artifact.blocks, strict=True):
            own: dict[str, tuple[int, tuple[int, ...]]] = {}
            for name, parameter in block.named_parameters():
                shape: tuple[int, ...]
                module = f"{path}.{name.removesuffix('.weight')}"
                groups = self.columns.get(module)
                if groups is not None:
                    shape = (parameter.shape[artifact.architecture.transposed], int(groups.max()) + 1)
                    shape = (2, *shape) if module in self.minimums else shape
                elif parameter.dim() == 1 and name.endswith(".weight"):
                    shape = tuple(parameter.shape)
                else:
                    continue
                own[name] = (total, shape)
                total += torch.Size(shape).numel()
            self._places.append(own)
        self.transposed = artifact.architecture.transposed
        self.values, self.first, self.second = (torch.zeros(total, device=device) for _ in range(3))
        self.gradient = torch.zeros(total, device=device)
        self.step = 0
        if file.exists():
            self._load()

    def block(self, index: int) -> dict[str, Tensor]:
        """The factors of a block, by parameter name: views of `values`."""
        return {name: self._view(self.values, place) for name, place in self._places[index].items()}

    def apply(self, index: int, name: str, weight: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """A parameter in float32 as the factors make it."""
        factor = factors.get(name)
        if factor is None:
            return weight.float()
        if weight.dim() == 1:
            return weight.float() + factor * norm_unit(weight)
        path = f"{self._paths[index]}.{name.removesuffix('.weight')}"
        matrix = weight.float().T if self.transposed else weight.float()
        scale, minimum = factor.unbind() if path in self.minimums else (factor, None)
        changed = matrix * by_column(1 + scale, self.columns[path], consecutive=self._consecutive[path])
        if minimum is not None:
            # q = scale * level - minimum, so scale * level is q + minimum
            changed = changed + _spread_minimum(self.minimums[path], scale - minimum, matrix.shape[1])
        return changed.T if self.transposed else changed

    def add_gradient(self, index: int, name: str, gradient: Tensor) -> None:
        """Keep the gradient of one parameter's factors for the next step."""
        self._view(self.gradient, self._places[index][name]).copy_(gradient)

    def descend(self, rate: float) -> None:
        """One step of Adam."""
        self.step += 1
        adam_(self.values, self.gradient, (self.first, self.second), self.step, rate, _FORGET)

    def save(self, beside: Mapping[str, Tensor]) -> None:
        """Put the training state into the file, whole or not at all, with what else is trained in the same steps.

        Raises OutputError.
        """
        own = {"values": self.values, "first": self.first, "second": self.second}
        save_tensors(self.file, {**own, **beside}, {"step": str(self.step)})

    def _load(self) -> None:
        with safe_open(self.file, "pt") as stored:
            for name in ("values", "first", "second"):
                getattr(self, name).copy_(stored.get_tensor(name))
            self.step = int(stored.metadata()["step"])

    @staticmethod
    def _view(flat: Tensor, place: tuple[int, tuple[int, ...]]) -> Tensor:
        start, shape = place
        return flat[start : start + torch.Size(shape).numel()].view(shape)


def _spread_minimum(minimum: Tensor, factor: Tensor, columns: int) -> Tensor:
    """[out, columns]: the minimums [out, sub-blocks] times the factor [out, groups] of their group."""
    by_group = minimum.float().view(*factor.shape, -1) * factor.unsqueeze(-1)
    return by_group.view(minimum.shape).repeat_interleave(columns // minimum.shape[1], 1)


def norm_unit(weight: Tensor) -> Tensor:
    """What a factor of a norm's weight multiplies: its size, or the usual size where it is smaller."""
    size = weight.float().abs()
    return torch.maximum(size, size.mean())  # nothing here asks the device for a number: steps are recorded
