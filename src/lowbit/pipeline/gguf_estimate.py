"""What making a GGUF file will about take, before it starts; as estimate.py has it for the other formats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lowbit.formats.gguf import PlannedTensor
from lowbit.methods.kquants.second_order import CUDA_WEIGHTS
from lowbit.pipeline.estimate import LIBRARIES, Estimate, Machine, Training
from lowbit.pipeline.sensitivity import GRADIENT_WINDOWS, PRICED_ROWS, PRICED_TOKENS, PRICED_TYPES

# all but the tensors that have another's inputs: keys and values the queries', the gate those of `up`
_INPUT = re.compile(r"\.(?!attn_k\.|attn_v\.|ffn_gate\.|\w+_exps\.)\w+\.weight$")
_HEADS = ("output.weight", "token_embd.weight")
# float32 operations that take as long as searching a grid for one weight, and as the loops of second-order rounding take for
# one weight and one column: measured on 2 CPU cores and on an H100
_SEARCH = {"cpu": 7600, "gpu": 300}
_LOOPS = {"cpu": 160, "gpu": 14}
_COPIES = 8  # float32 copies of a matrix that is rounded to second order
_DISK = 1.5e9  # bytes a second
_CONVERTER_STARTS = 5.0  # seconds
# forward passes through a block: watched as a whole; layer by layer, of each of the two streams
_PASSES = {"imatrix": 2.0, "hessian": 5.0}
_PASSES_BACK = 4  # forward twice, and back, as much as two
_SEARCHES = {"none": 1.0, "imatrix": 2.0, "hessian": 1.0}
_NONE = Training()


@dataclass(frozen=True)
class GgufWork:
    """What is asked for. converts: a checkpoint becomes an unquantized GGUF file first. fits: types are fitted before."""

    refine: Literal["none", "imatrix", "hessian"]
    windows: int
    tokens: int
    converts: bool
    training: Training = _NONE
    fits: bool = False


def estimate_gguf(planned: Sequence[PlannedTensor], work: GgufWork, machine: Machine, dtype: torch.dtype) -> Estimate:
    """Estimate a file of `planned` tensors; dtype: of the forward passes."""
    sizes = [(tensor.rows, tensor.shape[-1]) for tensor in planned if len(tensor.shape) > 1]
    weights = sum(rows * columns for rows, columns in sizes)
    files = 2 * weights * (3 if work.converts else 1) + sum(tensor.nbytes for tensor in planned)
    seconds = files / _DISK + (_CONVERTER_STARTS if work.converts else 0.0)
    seconds += _SEARCHES[work.refine] * _SEARCH[machine.kind] * weights / machine.exact
    memory = 4 * max(rows * columns for rows, columns in sizes)
    memory += LIBRARIES if machine.kind == "cpu" else 0
    if work.refine == "none":
        return Estimate(memory, seconds)
    more = _watching(planned, work, machine, dtype)
    if work.refine == "hessian":
        rounding = _rounding(planned, work, machine)
        fitting = _fitting(planned, work, machine) if work.fits else 0.0
        more = Estimate(more.memory + rounding.memory, more.seconds + rounding.seconds + fitting)
    return Estimate(memory + more.memory, seconds + more.seconds)


def _watching(planned: Sequence[PlannedTensor], work: GgufWork, machine: Machine, dtype: torch.dtype) -> Estimate:
    """Taking the states of calibration text through the blocks."""
    blocks = _blocks(planned)
    table = next(tensor for tensor in planned if tensor.name == "token_embd.weight")
    hidden, count = table.shape[-1], work.windows * work.tokens
    states = count * hidden * dtype.itemsize
    # two streams and the inputs of the layer in hand; else one, and the embedding as it is stored and as it computes
    memory = 3 * states if work.refine == "hessian" else states + 2 * dtype.itemsize * table.rows * hidden
    seconds = _PASSES[work.refine] * 2 * sum(map(_weights, blocks)) * count / machine.fast
    return Estimate(memory + 2 * dtype.itemsize * max(map(_weights, blocks)), seconds)


def _rounding(planned: Sequence[PlannedTensor], work: GgufWork, machine: Machine) -> Estimate:
    """Gram matrices, factors, column loops and sweeps of second order, and training after them."""
    blocks, count = _blocks(planned), work.windows * work.tokens
    inputs = _inputs([tensor for block in blocks for tensor in block])
    # experts that are merged into one tensor are rounded plainly
    rounded = [tensor for block in blocks for tensor in block if len(tensor.shape) == 2]
    rounded.append(next(tensor for name in _HEADS for tensor in planned if tensor.name == name))
    gram = sum(2 * 2.0 * columns**2 * count for columns in inputs)
    loops = sum(_LOOPS[machine.kind] * tensor.rows * float(tensor.shape[-1]) ** 2 for tensor in rounded)
    block = max(map(_weights, blocks))
    training = work.training.seconds(block, len(blocks), machine)
    working = max(_working_bytes(tensor, machine) for tensor in rounded)
    graph = work.training.memory(block, len(blocks), rounded[-1].shape[-1])
    return Estimate(max(working, graph), gram / machine.fast + (loops + _factoring(inputs)) / machine.exact + training)


def _fitting(planned: Sequence[PlannedTensor], work: GgufWork, machine: Machine) -> float:
    """Seconds that prices take: rows rounded to every type, a Gram matrix of every input and its factor, a pass back of a few
    windows."""
    matrices = [tensor for block in _blocks(planned) for tensor in block]
    count = min(work.windows * work.tokens, max(GRADIENT_WINDOWS * work.tokens, PRICED_TOKENS))
    back = min(work.windows, GRADIENT_WINDOWS) * work.tokens
    rows = sum(min(tensor.rows, PRICED_ROWS) * tensor.shape[-1] for tensor in matrices)
    inputs = _inputs(matrices)
    grams = sum(2.0 * columns**2 * count for columns in inputs)
    passes = 2 * _weights(matrices) * (count + _PASSES_BACK * back)
    exact = len(PRICED_TYPES) * _SEARCH[machine.kind] * rows + _factoring(inputs)
    return exact / machine.exact + (grams + passes) / machine.fast


def _inputs(matrices: Sequence[PlannedTensor]) -> list[int]:
    """Columns of every matrix whose inputs no other has."""
    return [tensor.shape[-1] for tensor in matrices if _INPUT.search(tensor.name)]


def _factoring(inputs: Sequence[int]) -> float:
    """Operations to factor their Gram matrices."""
    return sum(3.0 * columns**3 for columns in inputs)


def _blocks(planned: Sequence[PlannedTensor]) -> list[list[PlannedTensor]]:
    """Every block's matrices."""
    found: dict[str, list[PlannedTensor]] = {}
    for tensor in planned:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            found.setdefault(tensor.name.split(".")[1], []).append(tensor)
    return list(found.values())


def _weights(block: Sequence[PlannedTensor]) -> int:
    return sum(tensor.rows * tensor.shape[-1] for tensor in block)


def _working_bytes(tensor: PlannedTensor, machine: Machine) -> int:
    """Hessian, cross matrix, factor and one more; copies of the matrix, which a GPU takes in pieces."""
    weights = tensor.rows * tensor.shape[-1]
    at_once = weights if machine.kind == "cpu" else min(weights, CUDA_WEIGHTS)
    return 4 * (4 * tensor.shape[-1] ** 2 + _COPIES * at_once)
