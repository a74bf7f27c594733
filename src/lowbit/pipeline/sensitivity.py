"""How much the model's next-token distribution would move if a layer's outputs did: the curvature of the KL divergence.

Near the base, KL(base || changed) is 1/2 d^T F d with F the Fisher information, the mean of g g^T over gradients g of
log p(y) for labels y drawn from the model itself (Martens 2014). Taken to be independent of the layer's inputs and
diagonal over its outputs, as K-FAC does (Martens and Grosse 2015), a rounding error D of a weight costs
    1/2 sum over rows r of G_r (D A D^T)_rr,    G_r = mean squared gradient of output r,  A = Gram matrix of the inputs.
Second-order rounding makes up for the error of a column in those after it, which leaves sum over columns i of e_i^2 c_i of
(D A D^T)_rr, with e the errors of rounding to nearest and c what the factor of A says (methods/hessian.py).
G takes one pass through the model and back; the pass back keeps one block's graph at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core.progress import Progress
from lowbit.core.statistics import output_powers
from lowbit.core.streamed_model import StreamedModel
from lowbit.core.training import reproducible

# types that a matrix may have, and where rows are no multiple of 256
PRICED_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
PRICED_SMALL_BLOCKS = ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# rows of a matrix that are priced: the others are taken to be like them
PRICED_ROWS = 512
# tokens that prices are made from, at most: they say which layers matter, which little text does
PRICED_TOKENS = 2**15
# windows of the pass back: gradients are averaged over all of their tokens
GRADIENT_WINDOWS = 8
_LOGITS_TOKENS = 512


@dataclass(frozen=True)
class Sensitivity:
    """Mean squared gradients of log p(y), float32: layers: [out] by module path; head: [vocabulary], of the logits;
    embedding: [hidden], of the inputs of the first block."""

    layers: dict[str, Tensor] = field(default_factory=dict)
    head: Tensor | None = None
    embedding: Tensor | None = None


def price(weight: Tensor, rounded: Tensor, gram: Tensor, sensitivity: Tensor) -> float:
    """Nats a token that rounding costs: weight, rounded [out, in]; gram [in, in], the mean of x x^T; sensitivity [out]."""
    return 0.5 * (output_powers(weight - rounded, gram) * sensitivity).sum().item()


def price_by_column(weight: Tensor, rounded: Tensor, cost: Tensor, sensitivity: Tensor) -> float:
    """Nats a token that rounding costs where errors of columns do not add up: weight, and its rounding to nearest, [out, in];
    cost [in], of a unit of squared error in a column (under second order, of what later columns leave of it); sensitivity
    [out]."""
    return 0.5 * (((weight - rounded).square() @ cost) * sensitivity).sum().item()


def output_sensitivity(model: StreamedModel, windows: Tensor, progress: Progress, seed: int = 0) -> Sensitivity:
    """G of every linear layer, of the head and of the embedding, over token windows [samples, tokens]."""
    progress.start("sensitivity", 2 * len(model.blocks))
    tokens = windows.numel()
    layers: dict[str, Tensor] = {}
    with reproducible(), model.outside():
        with torch.no_grad():
            hidden = torch.cat([model.embed(window[None]).float() for window in windows])
        inputs = []
        for index in range(len(model.blocks)):
            inputs.append(hidden.to(model.dtype))
            with torch.no_grad(), model.block(index) as block:
                hidden = torch.cat([model.run_block(index, block, one[None].to(model.dtype)) for one in hidden])
            progress.advance()
        gradient, head = _head(model, hidden, seed)
    for index in reversed(range(len(model.blocks))):
        with reproducible(), model.block(index) as block:
            gradient = _through(model, index, block, inputs.pop(), gradient, layers)
        progress.advance()
    found = {path: squares / tokens for path, squares in layers.items()}
    return Sensitivity(found, head, gradient.square().sum((0, 1)) / tokens)


def _head(model: StreamedModel, hidden: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(gradient of log p(y) with respect to the states after the last block, mean p (1 - p) of every token)."""
    generator = torch.Generator(hidden.device).manual_seed(seed)
    gradient = torch.zeros(hidden.shape, device=hidden.device)
    variance: Tensor | None = None
    for window in range(len(hidden)):
        for start in range(0, hidden.shape[1], _LOGITS_TOKENS):
            leaf = hidden[window : window + 1, start : start + _LOGITS_TOKENS].to(model.dtype).detach().requires_grad_()
            with torch.enable_grad():
                log = model.logits(leaf).float().log_softmax(-1)[0]
                chances = log.detach().exp()
                labels = torch.multinomial(chances, 1, generator=generator)
                (own,) = torch.autograd.grad(log.gather(1, labels).sum(), leaf)
            gradient[window, start : start + _LOGITS_TOKENS] = own[0].float()
            spread = (chances * (1 - chances)).sum(0)
            variance = spread if variance is None else variance + spread
    assert variance is not None
    return gradient, variance / (hidden.shape[0] * hidden.shape[1])


def _through(
    model: StreamedModel, index: int, block: nn.Module, inputs: Tensor, gradient: Tensor, layers: dict[str, Tensor]
) -> Tensor:
    """The gradient before the block; squared gradients of its linear layers' outputs are added to `layers`."""
    names = [name for group in model.architecture.linears for name in group]

    def keep(path: str, own: Tensor) -> None:
        squares = own.float().square().flatten(0, -2).sum(0)
        layers[path] = layers[path] + squares if path in layers else squares

    def watch(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(lambda own: keep(path, own))

        return hook

    handles = [
        block.get_submodule(name).register_forward_hook(watch(f"{model.block_path(index)}.{name}")) for name in names
    ]
    before = []
    try:
        for window in range(len(inputs)):
            leaf = inputs[window : window + 1].detach().requires_grad_()
            with torch.enable_grad():
                output = model.run_block(index, block, leaf)
                before.append(torch.autograd.grad(output, leaf, gradient[window : window + 1].to(output.dtype))[0])
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(before).float()
