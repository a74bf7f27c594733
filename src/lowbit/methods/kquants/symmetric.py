"""Scale searches over symmetric grids: ggml's make_qx_quants and make_q3_quants.

Element-major tensors `[n elements of a sub-block, B sub-blocks]` as in `search`; on a GPU the package `gpu` does the same.
Source: llama.cpp, ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.methods.kquants.arithmetic import nearest_int, ratio, round_clamped_, sequential_sum, signed_extreme
from lowbit.methods.kquants.constants import GROUP_MAX_EPS, f32
from lowbit.methods.kquants.loops import gpu_for
from lowbit.methods.kquants.search import CUDA_SLICE_WEIGHTS, SLICE_WEIGHTS


@dataclass(frozen=True)
class SymmetricFit:
    """`x ~ scale * (code - half)` for each of B sub-blocks (`[B]`); codes are half + round(inverse * x).

    `empty` marks sub-blocks of zeros: scale 0 and, as in the C, code 0 (not `half`).
    """

    scale: Tensor
    inverse: Tensor
    empty: Tensor

    def codes(self, x: Tensor, half: int, which: Tensor | None = None) -> Tensor:
        """Codes the search settled on: float32 `[n, B]`, or `[n, K]` for the sub-blocks `which` (indices `[K]`)."""
        if which is not None:
            return SymmetricFit(self.scale[which], self.inverse[which], self.empty[which]).codes(x[:, which], half)
        codes = round_clamped_(x * self.inverse, -half, half - 1)
        return codes.add_(half).masked_fill_(self.empty, 0.0)


def search_symmetric(x: Tensor, weights: Tensor, half: int) -> SymmetricFit:
    """make_qx_quants, rmse_type 1: codes -half .. half-1, 19 trial scales; `weights` `[n, B]` are x*x when plain."""
    gpu = gpu_for(x)
    search_slice = _search_symmetric_slice if gpu is None else gpu.search_symmetric
    width = (CUDA_SLICE_WEIGHTS if x.is_cuda else SLICE_WEIGHTS) // x.shape[0]
    parts = [
        search_slice(x[:, at : at + width].contiguous(), weights[:, at : at + width].contiguous(), half)
        for at in range(0, x.shape[1], width)
    ]
    return SymmetricFit(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _search_symmetric_slice(x: Tensor, w: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
    size, signed = signed_extreme(x)
    empty = size < GROUP_MAX_EPS
    signed = torch.where(empty, 1.0, signed)
    weighted_x = w * x
    level = torch.empty_like(x)
    terms = x.new_empty(2, *x.shape)
    term_rows = terms.unbind(1)

    inverse = ratio(-float(half), signed)
    _moment_terms_(level, terms, x, w, weighted_x, inverse, half)
    sum_lx, sum_l2 = sequential_sum(term_rows).unbind(0)
    # C tests `suml2` for being nonzero here, and for being positive below; importance may be 0, never negative.
    scale = torch.where(sum_l2 != 0, sum_lx / sum_l2, 0.0)
    best = scale * sum_lx
    for step in (*range(-9, 0), *range(1, 10)):
        trial = ratio(-f32(half + f32(f32(0.1) * step)), signed)
        _moment_terms_(level, terms, x, w, weighted_x, trial, half)
        sum_lx, sum_l2 = sequential_sum(term_rows).unbind(0)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = torch.where(better, sum_lx / sum_l2, scale)
        best = torch.where(better, scale * sum_lx, best)
        inverse = torch.where(better, trial, inverse)
    return scale.masked_fill_(empty, 0.0), inverse, empty


def _moment_terms_(
    level: Tensor, terms: Tensor, x: Tensor, w: Tensor, weighted_x: Tensor, inverse: Tensor, half: int
) -> None:
    """terms = w*x*l and w*l*l with l = clamp(round(inverse*x)); |inverse*x| <= half + 0.9 by construction."""
    torch.mul(x, inverse, out=level)
    level.round_().clamp_(-half, half - 1)
    crossed, squared = terms.unbind(0)
    torch.mul(weighted_x, level, out=crossed)
    torch.mul(w, level, out=squared)
    squared.mul_(level)


def search_descending(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """make_q3_quants with do_rmse: scale `[B]` and codes 0 .. 2*half-1, float32 `[n, B]`, by coordinate descent."""
    gpu = gpu_for(x)
    search_slice = _search_descending_slice if gpu is None else gpu.search_descending
    width = (CUDA_SLICE_WEIGHTS if x.is_cuda else 4 * SLICE_WEIGHTS) // x.shape[0]
    parts = [search_slice(x[:, at : at + width].contiguous(), half) for at in range(0, x.shape[1], width)]
    return torch.cat([scale for scale, _ in parts]), torch.cat([codes for _, codes in parts], dim=1)


def _search_descending_slice(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    size, signed = signed_extreme(x)
    empty = size < GROUP_MAX_EPS
    inverse = ratio(-float(half), torch.where(empty, 1.0, signed))
    codes = (x * inverse).round_().clamp_(-half, half - 1)
    w = x * x
    weighted_x = w * x
    sum_lx = sequential_sum(weighted_x * codes)
    sum_l2 = sequential_sum(w * codes * codes)
    _descend_(x, w, weighted_x, codes, sum_lx, sum_l2, half, rounds=5)
    scale = torch.where(sum_l2 > 0, sum_lx / sum_l2, 0.0)
    return scale.masked_fill_(empty, 0.0), codes.add_(half).masked_fill_(empty, 0.0)


def _descend_(
    x: Tensor, w: Tensor, weighted_x: Tensor, codes: Tensor, sum_lx: Tensor, sum_l2: Tensor, half: int, rounds: int
) -> None:
    """Improve codes (and their moments) one element after the other; further rounds only where one changed."""
    changed = torch.zeros_like(sum_lx, dtype=torch.bool)
    for value, square, cube, code in zip(x.unbind(0), w.unbind(0), weighted_x.unbind(0), codes.unbind(0), strict=True):
        rest_lx = sum_lx - cube * code
        rest_l2 = sum_l2 - square * code * code
        new = nearest_int(value * rest_l2 / rest_lx).clamp_(-half, half - 1).to(torch.float32)
        new_lx = rest_lx + cube * new
        new_l2 = rest_l2 + square * new * new
        better = new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
        better &= (rest_lx > 0) & (new_l2 > 0) & (new != code)
        code.copy_(torch.where(better, new, code))
        sum_lx.copy_(torch.where(better, new_lx, sum_lx))
        sum_l2.copy_(torch.where(better, new_l2, sum_l2))
        changed |= better

    active = changed.nonzero().squeeze(1)
    if rounds == 1 or active.numel() == 0:
        return
    part_x, part_w, part_weighted = (tensor[:, active] for tensor in (x, w, weighted_x))
    part_codes, part_lx, part_l2 = (tensor.index_select(-1, active) for tensor in (codes, sum_lx, sum_l2))
    _descend_(part_x, part_w, part_weighted, part_codes, part_lx, part_l2, half, rounds - 1)
    for whole, part in ((codes, part_codes), (sum_lx, part_lx), (sum_l2, part_l2)):
        whole.index_copy_(-1, active, part)
