"""ggml's block types in torch: the encoding, the grids behind it, and which tensor gets which type."""

from lowbit.methods.kquants.codec import CODECS, Codec
from lowbit.methods.kquants.grid import Grid
from lowbit.methods.kquants.rows import decode, encode

__all__ = ["CODECS", "Codec", "Grid", "decode", "encode"]
