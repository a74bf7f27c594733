"""Rows of a matrix in ggml blocks, as unknowns of an optimization: all that a block stores can move, one part at a time.

Column-major: [in, out] for weights and levels, [blocks of a row, out] for scales. A weight is
    q = d * scale_code * level - dmin * min_code
where a type without integer scales has codes of one, and a type without minimums has dmin = 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.methods.kquants.codec import Codec
from lowbit.methods.kquants.grid import Grid, nearest_level
from lowbit.methods.kquants.loops import kernels_for
from lowbit.methods.kquants.pair import Pair

# what the integer scales of a sub-block can hold
_SCALE_CODES = {
    "Q2_K": (0, 15), "Q3_K": (-32, 31), "Q4_K": (0, 63), "Q5_K": (0, 63), "Q6_K": (-128, 127), "IQ4_XS": (-32, 31),
}  # fmt: skip


class RowsState:
    """Levels and scales of `out` rows on the way down. target: [in, out] float32."""

    def __init__(self, codec: Codec, grid: Grid, target: Tensor, codes: Tensor | None = None) -> None:
        self.codec, self.target = codec, target
        self.kernels: Any = kernels_for(target) if codec.uniform else None
        # MXFP4 has its levels in the order of its bits, and zero twice
        self.ascending = tuple(sorted(set(codec.levels)))
        self.by_code = torch.tensor(codec.levels, dtype=torch.float32, device=target.device)
        self.by_rank = torch.tensor(self.ascending, dtype=torch.float32, device=target.device)
        self.code_of_rank = torch.tensor(
            [codec.levels.index(level) for level in self.ascending], dtype=torch.uint8, device=target.device
        )
        self.float_scale = grid.d.dtype == torch.float32  # MXFP4: a power of two, left as it is
        self.d = _columns(grid.d)
        self.dmin = None if grid.dmin is None else _columns(grid.dmin)
        self.scale_codes = None if grid.scale_codes is None else _columns(grid.scale_codes)
        self.min_codes = None if grid.min_codes is None else _columns(grid.min_codes)
        self.block = target.shape[0] // self.d.shape[0]
        self.sub = self.block if self.scale_codes is None else codec.sub_block
        # sub-blocks of zeros stay exactly zero, whatever would serve the output better
        self.empty = target.view(-1, self.sub, target.shape[1]).abs().amax(1) == 0
        start = torch.zeros_like(target) if codes is None else self.by_code[codes.T.to(torch.int64)]
        self.levels = start.contiguous()

    def set_levels(self, levels: Tensor) -> None:
        self.levels = levels.contiguous()

    def scale_min(self) -> tuple[Tensor, Tensor | None]:
        """Scale and minimum of every sub-block, [in / sub, out]."""
        if self.scale_codes is None:
            return self.d, self.dmin
        per = self.block // self.sub
        scale = self.d.repeat_interleave(per, 0) * self.scale_codes
        if self.dmin is None or self.min_codes is None:
            return scale, None
        return scale, self.dmin.repeat_interleave(per, 0) * self.min_codes

    def column_grid(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and minimum of every column, [in, out], columns in the given order."""
        scale, minimum = self.scale_min()
        owner = order // self.sub
        return scale[owner], torch.zeros_like(scale)[owner] if minimum is None else minimum[owner]

    def nearest(self, values: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
        """The level nearest to each value; level 0, or the lowest, where the scale is 0."""
        shifted = values if minimum is None else values + minimum
        ratio = torch.where(scale == 0, 0.0, shifted / scale)
        if self.codec.uniform:
            return ratio.round_().clamp_(self.codec.levels[0], self.codec.levels[-1])
        return self.by_rank[nearest_level(ratio, self.ascending).to(torch.int64)]

    def dequantize(self) -> Tensor:
        """[in, out] float32."""
        scale, minimum = self.scale_min()
        blocks = self.levels.view(-1, self.sub, self.levels.shape[1]) * scale.unsqueeze(1)
        if minimum is not None:
            blocks -= minimum.unsqueeze(1)
        return blocks.view(self.levels.shape)

    def error(self, hessian: Tensor) -> Tensor:
        """[out]: r^T H r of every row."""
        residual = self.target - self.dequantize()
        return ((hessian @ residual) * residual).sum(0)

    def grid(self) -> Grid:
        """What the file stores."""
        return Grid(
            _rows(self.d, torch.float32 if self.float_scale else torch.float16),
            None if self.dmin is None else _rows(self.dmin, torch.float16),
            None if self.scale_codes is None else _rows(self.scale_codes, torch.int16),
            None if self.min_codes is None else _rows(self.min_codes, torch.int16),
        )

    def codes(self) -> Tensor:
        """uint8 [out, in]."""
        if self.codec.uniform:
            return (self.levels - self.codec.levels[0]).to(torch.uint8).T.contiguous()
        return self.code_of_rank[nearest_level(self.levels, self.ascending).to(torch.int64)].T.contiguous()

    def sweep(self, hessian: Tensor) -> Tensor:
        """Move every part once, in place: per block its float scales, then by sub-block the integer scales and codes.

        Returns by how much the error of all rows together grew.
        """
        if self.codec.uniform and self.target.is_cuda:
            return self.sweep_fused(hessian)
        residual = self.target - self.dequantize()
        grown = torch.zeros((), device=residual.device)
        for block in range(self.d.shape[0]):
            span = slice(block * self.block, (block + 1) * self.block)
            own = hessian[span, span]
            gradient = hessian[span] @ residual
            arrived = gradient.clone()
            before = self._dequantize_block(block)
            if not self.float_scale:
                self._move_floats(block, span, own, gradient)
            for at in range(span.start, span.stop, self.sub):
                inside = at - span.start
                here = slice(inside, inside + self.sub)
                move = self._move_sub_block if self.kernels is None else self._move_compiled
                delta = move(block, at // self.sub, own[here, here], gradient[here])
                rest = slice(here.stop, None)
                gradient[rest].addmm_(own[rest, here], delta, alpha=-1)
            delta = self._dequantize_block(block) - before
            grown += (delta * ((own @ delta).sub_(arrived, alpha=2))).sum()
            residual[span] -= delta
        return grown

    def sweep_fused(self, hessian: Tensor) -> Tensor:
        """The same, one kernel for each 256 columns."""
        from lowbit.methods.kquants import sweep_kernels

        blocks = sweep_kernels.Blocks(
            self.levels,
            self.d,
            self.dmin,
            self.scale_codes,
            self.min_codes,
            self.empty,
            (self.codec.levels[0], self.codec.levels[-1]),
            _SCALE_CODES.get(self.codec.ggml_type, (0, 0)),
        )
        return sweep_kernels.sweep(blocks, self.target - self.dequantize(), hessian).sum()

    def _dequantize_block(self, block: int) -> Tensor:
        span = slice(block * self.block, (block + 1) * self.block)
        scale, minimum = self._block_grid(block)
        levels = self.levels[span].view(-1, self.sub, self.levels.shape[1])
        values = levels * scale.unsqueeze(1)
        if minimum is not None:
            values -= minimum.unsqueeze(1)
        return values.view(self.block, -1)

    def _block_grid(self, block: int) -> tuple[Tensor, Tensor | None]:
        """Scale and minimum of one block's sub-blocks, [subs, out]."""
        if self.scale_codes is None:
            return self.d[block : block + 1], None if self.dmin is None else self.dmin[block : block + 1]
        per = self.block // self.sub
        span = slice(block * per, (block + 1) * per)
        minimum = None
        if self.dmin is not None and self.min_codes is not None:
            minimum = self.dmin[block] * self.min_codes[span]
        return self.d[block] * self.scale_codes[span], minimum

    def _move_floats(self, block: int, span: slice, own: Tensor, gradient: Tensor) -> None:
        """d and dmin of one block to their best values given all codes; the gradient follows."""
        levels = self.levels[span]
        per = self.block // self.sub
        subs = slice(block * per, (block + 1) * per)
        along = levels
        if self.scale_codes is not None:
            along = levels * self.scale_codes[subs].repeat_interleave(self.sub, 0)
        across = None
        if self.dmin is not None:
            across = -torch.ones_like(levels)
            if self.min_codes is not None:
                across = -self.min_codes[subs].repeat_interleave(self.sub, 0)
        pair = Pair(along, across, own, gradient)
        step, step_min = pair.solution()
        d = (self.d[block] + step).half().float()
        dmin = None if self.dmin is None else (self.dmin[block] + step_min).half().float()
        moved, moved_min = d - self.d[block], 0.0 if dmin is None or self.dmin is None else dmin - self.dmin[block]
        usable = torch.isfinite(d) & (d != 0) & (self.d[block] != 0)
        if dmin is not None:
            usable &= torch.isfinite(dmin)
        better = usable & (pair.change(moved, moved_min) < 0)
        moved = torch.where(better, moved, 0.0)
        self.d[block] += moved
        delta = along * moved
        if self.dmin is not None and across is not None:
            moved_min = torch.where(better, moved_min, 0.0)
            self.dmin[block] += moved_min
            delta += across * moved_min
        gradient.addmm_(own, delta, alpha=-1)

    def _move_sub_block(self, block: int, index: int, square: Tensor, gradient: Tensor) -> Tensor:
        """Integer scales of one sub-block, then its codes one after the other; returns what the weights changed by."""
        before = self._dequantize_sub(block, index)
        local = gradient.clone()
        if self.scale_codes is not None:
            self._move_integers(block, index, square, local)
        scale, minimum = self._sub_grid(block, index)
        power = square.diagonal()
        levels = self.levels[index * self.sub : (index + 1) * self.sub]
        for j in range(self.sub):
            level = levels[j]
            value = scale * level if minimum is None else scale * level - minimum
            new = self.nearest(value + local[j] / power[j], scale, minimum)
            new = torch.where(scale == 0, level, new)
            if j + 1 < self.sub:
                local[j + 1 :].addr_(square[j + 1 :, j], (new - level) * scale, alpha=-1)
            levels[j] = new
        return self._dequantize_sub(block, index) - before

    def _move_compiled(self, block: int, index: int, square: Tensor, gradient: Tensor) -> Tensor:
        """The same in one kernel."""
        moved: Tensor = self.kernels.move_sub_block(
            gradient,
            square,
            self.levels[index * self.sub : (index + 1) * self.sub],
            self.d[block],
            None if self.dmin is None else self.dmin[block],
            None if self.scale_codes is None else self.scale_codes[index],
            None if self.min_codes is None else self.min_codes[index],
            self.empty[index],
            (self.codec.levels[0], self.codec.levels[-1]),
            _SCALE_CODES.get(self.codec.ggml_type, (0, 0)),
        )
        return moved

    def _sub_grid(self, block: int, index: int) -> tuple[Tensor, Tensor | None]:
        if self.scale_codes is None:
            return self.d[block], None if self.dmin is None else self.dmin[block]
        minimum = None
        if self.dmin is not None and self.min_codes is not None:
            minimum = self.dmin[block] * self.min_codes[index]
        return self.d[block] * self.scale_codes[index], minimum

    def _dequantize_sub(self, block: int, index: int) -> Tensor:
        scale, minimum = self._sub_grid(block, index)
        values = self.levels[index * self.sub : (index + 1) * self.sub] * scale
        return values if minimum is None else values - minimum

    def _move_integers(self, block: int, index: int, square: Tensor, local: Tensor) -> None:
        """scale_code and min_code of one sub-block to their best whole numbers given its levels; `local` follows."""
        assert self.scale_codes is not None
        low, high = _SCALE_CODES[self.codec.ggml_type]
        levels = self.levels[index * self.sub : (index + 1) * self.sub]
        along = levels * self.d[block]
        across = None
        if self.dmin is not None and self.min_codes is not None:
            across = (-self.dmin[block]).expand_as(levels)
        pair = Pair(along, across, square, local)
        step, _ = pair.solution()
        old = self.scale_codes[index]
        new = (old + step).round().clamp(low, high)
        new = torch.where(torch.isfinite(new), new, old)
        moved = new - old
        moved_min: Tensor | float = 0.0
        if self.min_codes is not None:
            old_min = self.min_codes[index]
            new_min = (old_min + pair.second(moved)).round().clamp(low, high)
            moved_min = torch.where(torch.isfinite(new_min), new_min, old_min) - old_min
        better = (pair.change(moved, moved_min) < 0) & ~self.empty[index] & (new != 0)
        moved = torch.where(better, moved, 0.0)
        self.scale_codes[index] += moved
        delta = along * moved
        if self.min_codes is not None and across is not None:
            moved_min = torch.where(better, moved_min, 0.0)
            self.min_codes[index] += moved_min
            delta += across * moved_min
        local.addmm_(square, delta, alpha=-1)


def _columns(grid_part: Tensor) -> Tensor:
    return grid_part.to(torch.float32).T.contiguous()


def _rows(part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.T.contiguous().to(dtype)
