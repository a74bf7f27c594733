"""Norms in few passes over the states.

transformers writes root-mean-square norms as seven tensor operations in float32, which together take longer than a layer's
attention. PyTorch has one kernel for them on a GPU, and on a CPU some work can be done in place. Which modules are such norms
is not taken from their names: they are tried.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import rms_norm

_EPSILONS = ("variance_epsilon", "eps", "epsilon")


class RootMeanSquareNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension; the mean in float32, the product in x's dtype, as
    transformers rounds them (LlamaRMSNorm)."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., features] -> the same shape and dtype."""
        if hidden.is_cuda or torch.is_grad_enabled():
            return self.weight * rms_norm(hidden, self.weight.shape, eps=self.epsilon)
        wide = hidden.float()
        power = vector_norm(wide, dim=-1, keepdim=True).square_().div_(hidden.shape[-1])
        factor = power.add_(self.epsilon).rsqrt_()
        normed: Tensor = (wide * factor if wide is hidden else wide.mul_(factor)).to(hidden.dtype)
        return normed.mul_(self.weight)


def fuse_norms(model: nn.Module) -> int:
    """Put RootMeanSquareNorm in the place of every module that computes it, in place; how many there were. Parameters keep
    their names, and may be on the meta device."""
    tried: dict[tuple[type[nn.Module], int, float], bool] = {}
    fused: dict[nn.Module, RootMeanSquareNorm] = {}  # a module in two places stays one
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            found = _weight_and_epsilon(module)
            if found is None:
                continue
            weight, epsilon = found
            kind = (type(module), len(weight), epsilon)
            if kind not in tried:
                tried[kind] = _computes_the_same(module, len(weight), epsilon)
            if tried[kind]:
                setattr(parent, name, fused.setdefault(module, RootMeanSquareNorm(weight, epsilon)))
    return len(fused)


def _weight_and_epsilon(module: nn.Module) -> tuple[nn.Parameter, float] | None:
    """Of a module with one vector of parameters, nothing else, and an epsilon."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    epsilon = next((vars(module)[name] for name in _EPSILONS if isinstance(vars(module).get(name), float)), None)
    alone = len(parameters) == 1 and not list(module.buffers())
    if weight is None or weight.dim() != 1 or epsilon is None or not alone:
        return None
    return weight, epsilon


@torch.no_grad()
def _computes_the_same(module: nn.Module, features: int, epsilon: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, features, generator=generator) * torch.tensor([1e-4, 0.1, 1.0, 30.0])[:, None] + 0.01
    weight = nn.Parameter(torch.randn(features, generator=generator), requires_grad=False)
    expected = torch.func.functional_call(module, {"weight": weight}, (hidden,))
    return torch.allclose(RootMeanSquareNorm(weight, epsilon)(hidden), expected, rtol=1e-5, atol=1e-6)
