"""ggml tensor types and llama.cpp file types, as data.

Source: llama.cpp, ggml/include/ggml.h (`enum ggml_type`), ggml/src/ggml-common.h (block layouts) and
include/llama.h (`enum llama_ftype`).
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.core.errors import FormatError, did_you_mean


@dataclass(frozen=True)
class GGMLType:
    """One storage type of a GGUF tensor: `block_size` weights take `block_bytes` bytes."""

    name: str
    id: int
    block_size: int
    block_bytes: int

    @property
    def quantized(self) -> bool:
        return self.block_size > 1

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` weights; FormatError if the row is not a whole number of blocks."""
        if columns <= 0 or columns % self.block_size:
            raise FormatError(
                f"A row of {columns} weights is not a whole number of {self.name} blocks of {self.block_size}.",
                hint="pick a type with blocks of 32, or let the type policy fall back",
            )
        return columns // self.block_size * self.block_bytes


@dataclass(frozen=True)
class FileType:
    """A llama.cpp file type: the mixture's name, `general.file_type` id and the type most tensors get."""

    name: str
    id: int
    default_type: str


GGML_TYPES: dict[str, GGMLType] = {
    entry.name: entry
    for entry in (
        GGMLType("F32", 0, 1, 4),
        GGMLType("F16", 1, 1, 2),
        GGMLType("BF16", 30, 1, 2),
        GGMLType("Q4_0", 2, 32, 18),
        GGMLType("Q4_1", 3, 32, 20),
        GGMLType("Q5_0", 6, 32, 22),
        GGMLType("Q5_1", 7, 32, 24),
        GGMLType("Q8_0", 8, 32, 34),
        GGMLType("Q2_K", 10, 256, 84),
        GGMLType("Q3_K", 11, 256, 110),
        GGMLType("Q4_K", 12, 256, 144),
        GGMLType("Q5_K", 13, 256, 176),
        GGMLType("Q6_K", 14, 256, 210),
        GGMLType("IQ4_NL", 20, 32, 18),
        GGMLType("IQ4_XS", 23, 256, 136),
        GGMLType("MXFP4", 39, 32, 17),
    )
}

FILE_TYPES: dict[str, FileType] = {
    entry.name: entry
    for entry in (
        FileType("F32", 0, "F32"),
        FileType("F16", 1, "F16"),
        FileType("BF16", 32, "BF16"),
        FileType("Q4_0", 2, "Q4_0"),
        FileType("Q4_1", 3, "Q4_1"),
        FileType("Q5_0", 8, "Q5_0"),
        FileType("Q5_1", 9, "Q5_1"),
        FileType("Q8_0", 7, "Q8_0"),
        FileType("Q2_K", 10, "Q2_K"),
        FileType("Q3_K_S", 11, "Q3_K"),
        FileType("Q3_K_M", 12, "Q3_K"),
        FileType("Q3_K_L", 13, "Q3_K"),
        FileType("Q4_K_S", 14, "Q4_K"),
        FileType("Q4_K_M", 15, "Q4_K"),
        FileType("Q5_K_S", 16, "Q5_K"),
        FileType("Q5_K_M", 17, "Q5_K"),
        FileType("Q6_K", 18, "Q6_K"),
        FileType("IQ4_NL", 25, "IQ4_NL"),
        FileType("IQ4_XS", 30, "IQ4_XS"),
        FileType("MXFP4_MOE", 38, "MXFP4"),
    )
}

FILE_TYPE_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}


def ggml_type(name: str) -> GGMLType:
    """The type called `name` (any case); FormatError if there is none."""
    found = GGML_TYPES.get(name.upper())
    if found is None:
        raise FormatError(
            f"There is no ggml type called {name!r}{did_you_mean(name.upper(), GGML_TYPES)}.",
            hint=f"known types: {', '.join(GGML_TYPES)}",
        )
    return found


def file_type(name: str) -> FileType:
    """The file type (mixture) called `name` (any case, aliases as in llama-quantize); FormatError if there is none."""
    found = FILE_TYPES.get(FILE_TYPE_ALIASES.get(name.upper(), name.upper()))
    if found is None:
        raise FormatError(
            f"There is no GGUF file type called {name!r}{did_you_mean(name.upper(), FILE_TYPES)}.",
            hint=f"known file types: {', '.join(FILE_TYPES)}",
        )
    return found
