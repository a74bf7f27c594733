"""One `Codec` for every block type, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowbit.methods.kquants import iq4, legacy, mxfp4, q2_k, q3_k, q4_k, q6_k
from lowbit.methods.kquants.grid import Grid, round_levels, round_uniform


@dataclass(frozen=True)
class Codec:
    """How one ggml type finds, uses and stores its grid; weights are `scale * levels[code] - minimum`.

    `choose(weights, importance)` gives ggml's own Grid and codes (uint8 `[rows, cols]`); `pack` and `unpack` convert
    Grid and codes to and from the file's bytes (uint8 `[rows, bytes]`). All take whole rows, unchunked.
    """

    ggml_type: str
    sub_block: int
    levels: tuple[int, ...]
    choose: Callable[[Tensor, Tensor | None], tuple[Grid, Tensor]]
    pack: Callable[[Grid, Tensor], Tensor]
    unpack: Callable[[Tensor], tuple[Grid, Tensor]]

    def search(self, weights: Tensor, importance: Tensor | None = None) -> Grid:
        """ggml's own grid for `weights` float32 `[rows, cols]` and `importance` float32 `[cols]`."""
        return self.choose(weights, importance)[0]

    def round(self, weights: Tensor, grid: Grid) -> Tensor:
        """Nearest codes on `grid`, uint8 `[rows, cols]`.

        For k-quants these are ggml's own codes, but for sub-blocks of scale 0 (any code gives the same weight there).
        The other types choose codes before they round the scale to float16, so codes can differ from `choose`.
        """
        if self.ggml_type == "MXFP4":
            return mxfp4.round_mxfp4(weights, grid)
        if self.uniform:
            return round_uniform(weights, grid, self.levels[0], self.levels[-1])
        return round_levels(weights, grid, self.levels)

    @property
    def uniform(self) -> bool:
        return self.levels[-1] - self.levels[0] + 1 == len(self.levels)

    def scale_min(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Scale and minimum of every sub-block, float32 `[rows, cols / sub_block]`, exactly as they dequantize."""
        scale, minimum = grid.scale_min()
        return scale, torch.zeros_like(scale) if minimum is None else minimum

    def dequantize(self, grid: Grid, codes: Tensor) -> Tensor:
        """Weights float32 `[rows, cols]`."""
        scale, minimum = grid.scale_min()
        levels = torch.tensor(self.levels, dtype=torch.float32, device=codes.device)
        weights = levels[codes.to(torch.int32)].view(*scale.shape, -1).mul_(scale.unsqueeze(-1))
        if minimum is not None:
            weights -= minimum.unsqueeze(-1)
        return weights.view(codes.shape)


def _levels(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


CODECS: dict[str, Codec] = {
    codec.ggml_type: codec
    for codec in (
        Codec(
            "Q4_0", 32, _levels(-8, 7), partial(legacy.choose_symmetric, half=8), legacy.pack_q4_0, legacy.unpack_q4_0
        ),
        Codec("Q4_1", 32, _levels(0, 15), partial(legacy.choose_affine, top=15), legacy.pack_q4_1, legacy.unpack_q4_1),
        Codec(
            "Q5_0",
            32,
            _levels(-16, 15),
            partial(legacy.choose_symmetric, half=16),
            legacy.pack_q5_0,
            legacy.unpack_q5_0,
        ),
        Codec("Q5_1", 32, _levels(0, 31), partial(legacy.choose_affine, top=31), legacy.pack_q5_1, legacy.unpack_q5_1),
        Codec("Q8_0", 32, _levels(-128, 127), legacy.choose_q8_0, legacy.pack_q8_0, legacy.unpack_q8_0),
        Codec("Q2_K", 16, _levels(0, 3), q2_k.choose_q2_k, q2_k.pack_q2_k, q2_k.unpack_q2_k),
        Codec("Q3_K", 16, _levels(-4, 3), q3_k.choose_q3_k, q3_k.pack_q3_k, q3_k.unpack_q3_k),
        Codec("Q4_K", 32, _levels(0, 15), q4_k.choose_q4_k, q4_k.pack_q4_k, q4_k.unpack_q4_k),
        Codec("Q5_K", 32, _levels(0, 31), q4_k.choose_q5_k, q4_k.pack_q5_k, q4_k.unpack_q5_k),
        Codec("Q6_K", 16, _levels(-32, 31), q6_k.choose_q6_k, q6_k.pack_q6_k, q6_k.unpack_q6_k),
        Codec("IQ4_NL", 32, iq4.LEVELS, iq4.choose_iq4_nl, legacy.pack_q4_0, legacy.unpack_q4_0),
        Codec("IQ4_XS", 32, iq4.LEVELS, iq4.choose_iq4_xs, iq4.pack_iq4_xs, iq4.unpack_iq4_xs),
        Codec("MXFP4", 32, mxfp4.LEVELS, mxfp4.choose_mxfp4, mxfp4.pack_mxfp4, mxfp4.unpack_mxfp4),
    )
}
