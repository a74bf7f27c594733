"""What calibration leaves behind of the inputs of a linear layer: the Gram matrix and a few channel statistics."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lowbit.core.distributed import ALONE, World

# tokens converted to float32 at a time on a CPU: a 7B's down projection takes 43 KiB for each
_WIDENED = 1024
# columns of a block of the Gram matrix, at least: narrower products do not fill the machine
_NARROWEST = 256

Block = tuple[slice, slice]  # rows and columns of a matrix
_EVERYTHING: tuple[Block, ...] = ((slice(None), slice(None)),)


class InputStatistics:
    """Sums over calibration tokens x [in] of the inputs of one or more linear layers that share them.

    gram: [in, in] float32, sum of x x^T (blocks below the diagonal come last), after `finish` the mean; what the GPTQ paper
    calls the Hessian, but for a factor 2.
    cross: [in, in] float32, of (x_original - x) x^T likewise, when the inputs of the original model are collected too.
    largest: [in] float32, largest absolute input of each channel. absolute: [in] float32, sum of absolute inputs; both stay
    zero without `sizes`.
    tokens: number of tokens summed.
    sample: [tokens / sample_every, in], every so manieth token's input as it is; None without `sample_every`.
    before: tokens that other processes see before this one's, so that all together sample the same ones.
    world: after `finish`, the processes that all have these sums, and may share what is computed from them.
    """

    def __init__(
        self,
        features: int,
        device: torch.device,
        *,
        gram: bool = True,
        cross: bool = False,
        sizes: bool = True,
        sample_every: int = 0,
        before: int = 0,
    ) -> None:
        self.features, self.before = features, before
        self.sizes, self.sample_every = sizes, sample_every
        self.world = ALONE
        self.sample: Tensor | None = None
        self._samples: list[Tensor] = []
        self.tokens = 0
        self.gram = torch.zeros(features, features, device=device) if gram else None
        self.cross = torch.zeros(features, features, device=device) if cross else None
        self.largest = torch.zeros(features, device=device)
        self.absolute = torch.zeros(features, device=device)

    def add(self, inputs: Tensor, original: Tensor | None = None) -> None:
        """Add inputs [..., in], 16 or 32 bit; `original` [..., in] are the same tokens' inputs in the original model."""
        x = inputs.reshape(-1, self.features)
        if self.sample_every:
            self._samples.append(x[-(self.before + self.tokens) % self.sample_every :: self.sample_every].clone())
        self.tokens += x.shape[0]
        if self.sizes:
            magnitude = x.abs()
            self.largest = torch.maximum(self.largest, magnitude.amax(0).float())
            self.absolute += magnitude.sum(0, dtype=torch.float32)
        if self.gram is not None:
            accumulate_product_(self.gram, x, x, blocks_above_diagonal(self.features))
        if self.cross is not None and original is not None:
            accumulate_product_(self.cross, original.reshape(-1, self.features).to(x.dtype) - x, x)

    def finish(self, world: World = ALONE) -> None:
        """Join the sums of all processes, and turn the matrices into means over tokens, in place: at a 7B's down
        projection each is half a GiB."""
        self.world = world
        self.tokens = world.total(self.tokens)
        if self.gram is not None:
            _mirror_(self.gram)
        world.max_(self.largest)
        world.sum_(self.absolute)
        for matrix in (self.gram, self.cross):
            if matrix is not None:
                world.sum_(matrix).div_(max(self.tokens, 1))
        if self._samples:
            sample = torch.cat(self._samples)
            self.sample = world.concatenate(sample, world.lengths(sample))
            self._samples.clear()

    def take_cross(self) -> Tensor | None:
        """The cross matrix, handed over: it is used once, and at a 7B's down projection it is half a GiB."""
        cross, self.cross = self.cross, None
        return cross


def accumulate_product_(total: Tensor, left: Tensor, right: Tensor, blocks: Sequence[Block] = _EVERYTHING) -> None:
    """total [m, n] float32 += left^T right, for left [tokens, m] and right [tokens, n], summed in float32; in these blocks of
    `total` only.

    16-bit inputs are multiplied as they are: the products are exact in float32, and converting first would cost several
    times the time on matrix units.
    """
    if left.is_cuda and left.dtype != torch.float32:
        for rows, columns in blocks:
            block = total[rows, columns]
            torch.addmm(block, left[:, rows].T, right[:, columns], out_dtype=torch.float32, out=block)
        return
    at_once = len(left) if left.is_cuda else _WIDENED
    with _bfloat16_products() if left.dtype == torch.bfloat16 else nullcontext():
        for part, other in zip(torch.split(left, at_once), torch.split(right, at_once), strict=True):
            wide = other.float()
            own = wide if left is right else part.float()
            for rows, columns in blocks:
                total[rows, columns].addmm_(own[:, rows].T, wide[:, columns])


def blocks_above_diagonal(features: int) -> list[Block]:
    """Blocks of a symmetric matrix that hold its diagonal and all above it: four rows of them save three eighths of the
    operations. Narrow matrices are left whole."""
    count = min(4, max(1, features // _NARROWEST))
    edges = [features * i // count for i in range(count + 1)]
    return [(slice(start, stop), slice(start, features)) for start, stop in itertools.pairwise(edges)]


def output_powers(weight: Tensor, gram: Tensor) -> Tensor:
    """[out]: w G w^T of every row of weight [out, in], what it gives for inputs of Gram matrix G [in, in], squared; of the
    blocks of G on and above its diagonal."""
    powers = weight.new_zeros(len(weight))
    for own, rest in blocks_above_diagonal(len(gram)):
        products = (weight[:, own] @ gram[own, rest]).mul_(weight[:, rest])
        powers.add_(products.sum(1), alpha=2).sub_(products[:, : own.stop - own.start].sum(1))
    return powers


def _mirror_(total: Tensor) -> None:
    """Fill in the blocks below the diagonal."""
    for own, rest in blocks_above_diagonal(len(total)):
        below = slice(own.stop, rest.stop)
        total[below, own] = total[own, below].T


@contextmanager
def tensor_float32_products(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices on a GPU take operands of 11 significant bits, several times faster: enough for numbers
    that are only reported or compared. Elsewhere nothing changes."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


@contextmanager
def rough_products(device: torch.device) -> Iterator[None]:
    """As above, and on a CPU that has units for it with operands of 8 significant bits: for products that are summed up and
    reported, where large numbers do not cancel."""
    rough = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    with _bfloat16_products() if rough else tensor_float32_products(device):
        yield


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """oneDNN multiplies float32 operands as bfloat16 inside: exact for operands that came from bfloat16."""
    library: Any = torch.backends.mkldnn  # has attributes that are added at run time
    settings = library.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
