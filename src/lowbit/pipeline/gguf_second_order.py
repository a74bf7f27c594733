"""Second-order rounding of a whole model into GGUF, block by block, each fed by the quantized blocks before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat

import torch
from torch import Tensor, nn

from lowbit.core.checkpoint.gguf_source import dequantized
from lowbit.core.errors import CheckpointError
from lowbit.core.statistics import InputStatistics, output_powers, tensor_float32_products
from lowbit.core.streamed_model import StreamedModel
from lowbit.methods.kquants import CODECS, decode
from lowbit.methods.kquants.curvature import Curvature, factor_gram, toward_original
from lowbit.methods.kquants.second_order import CUDA_WEIGHTS, SecondOrderOptions, quantize, split
from lowbit.methods.learned_blocks import BlockMatrix, LearnedBlocks
from lowbit.methods.learning import LearnOptions
from lowbit.pipeline.activations import Activations
from lowbit.pipeline.gguf_encode import Behind, GgufJob, read_ahead
from lowbit.pipeline.gguf_names import LinearTensor, row_order
from lowbit.pipeline.gguf_stream import embedded, head_statistics
from lowbit.pipeline.job import place_weight
from lowbit.pipeline.learn import kept_start, train_block
from lowbit.pipeline.passage import BEHIND, BETWEEN, HalvesFinder, Passage
from lowbit.pipeline.run import Streams

_TIED_DAMPING = 0.05


@dataclass(frozen=True)
class Rounded:
    """A layer as it was rounded. dense: its weight, rows in the file's order as those of `matrix`. error: relative, of its
    outputs, before any training."""

    linear: LinearTensor
    dense: Tensor
    matrix: BlockMatrix
    error: float


@dataclass(frozen=True)
class SecondOrderRun:
    """A run over all blocks. linears: the layers to round, by module path. head: the output matrix's tensor, to be rounded
    after them; where it is the token embedding too, that has been written before, for the blocks to be fed by. learning: of
    the training of every block once its layers are rounded; None for none. orders: the order of each layer's rows in the
    last block, by its name there."""

    job: GgufJob
    model: StreamedModel
    linears: Mapping[str, LinearTensor]
    streams: Streams
    options: SecondOrderOptions
    head: str | None = None
    learning: LearnOptions | None = None
    halves: HalvesFinder = field(default_factory=HalvesFinder)
    orders: dict[str, Tensor] = field(default_factory=dict)

    def quantize(self, windows: Tensor) -> int:
        """Round all blocks on calibration token windows [samples, tokens]; returns how many blocks an earlier run had
        done. All other tensors must have been written before. Raises LowbitError subclasses."""
        progress, model = self.job.progress, self.model
        blocks = len(model.blocks)
        wanted = [linear.tensor for linear in self.linears.values()] + ([self.head] if self.head else [])
        if all(self.job.is_done(tensor) for tensor in wanted):
            return blocks
        progress.start("quantize", blocks)
        resumed = 0
        compares = self.options.asymmetric > 0 or self.learning is not None
        states = embedded(model, windows, self.streams, self._embedding(), copies=1 + compares)
        # the unquantized model's states, whose outputs are what every layer aims at
        original = embedded(model, windows, self.streams, copies=2) if compares else None
        if self.learning is not None:
            with torch.no_grad(), model.outside():
                model.embed(windows[: self.learning.batch_of(len(windows))])  # notes what blocks are called with
        with Behind(self.job) as behind:
            for index in range(blocks):
                own = {linear.name: linear for linear in self.linears.values() if linear.block == index}
                finished = all(self.job.is_done(linear.tensor) for linear in own.values())
                weights = model.read_block(index)
                with torch.no_grad(), model.block(index, weights) as module:
                    # training wants the states before the block once its layers are rounded
                    halves = None if self.learning else self.halves.find(model, index, module, states)
                    passages = [Passage(model, index, module, states, halves=halves)]
                    if original is not None:
                        passages.append(Passage(model, index, module, original, weights, halves))
                    if finished:
                        resumed += 1
                        self._restore(module, own, weights)
                    else:
                        self._do_block(behind, own, weights, *passages)
                    if index + 1 < blocks or self.head:
                        for passage in passages:
                            passage.advance(BEHIND)
                progress.advance()
            if self.head:
                self._do_head(behind, self.head, states, original)
        return resumed

    def _do_head(self, behind: Behind, tensor: str, states: Activations, original: Activations | None) -> None:
        self.job.progress.note(tensor)
        statistics = head_statistics(self.model, states, original)
        gram = statistics.gram
        assert gram is not None
        # a tied matrix is read as the embedding too, where every column counts the same
        damping = _TIED_DAMPING if tensor == "token_embd.weight" else self.options.damping
        curvature = factor_gram(gram, damping)
        dense = self._dense(tensor, self.job.source.stored(tensor))
        type_name = self.job.types[tensor]
        grid, codes = quantize(type_name, self._target(dense, curvature, statistics), curvature, self.options)
        error = _relative(dense, CODECS[type_name].dequantize(grid, codes), curvature)
        behind.write(tensor, CODECS[type_name].pack(grid, codes), error)

    def _do_block(
        self,
        behind: Behind,
        own: Mapping[str, LinearTensor],
        weights: Mapping[str, Tensor],
        arriving: Passage,
        original: Passage | None = None,
    ) -> None:
        groups = [[name for name in group if name in own] for group in self.model.architecture.linears]
        groups = [group for group in groups if group]
        compared = original if self.options.asymmetric > 0 else None
        rounded: dict[str, Rounded] = {}
        stored = read_ahead(self.job.source, [own[name].tensor for group in groups for name in group])
        for names, following in zip(groups, [*(group[0] for group in groups[1:]), None], strict=True):
            self.job.progress.note(f"{self.model.block_path(arriving.index)} {', '.join(names)}")
            until = arriving.place_before(following)
            statistics = _watched(arriving, compared, names[0], until)
            for one in self._round_group(arriving.module, [own[name] for name in names], weights, statistics, stored):
                if self.learning is None:
                    behind.write(one.linear.tensor, one.matrix.pack(), one.error)
                else:
                    rounded[one.linear.name] = one
            if until == BETWEEN:
                arriving.advance(BETWEEN)
        if self.learning is not None and original is not None:
            original.advance(BEHIND)
            for one in self._learned(rounded, arriving, original.states, self.learning):
                behind.write(one.linear.tensor, one.matrix.pack(), one.error)
        behind.finish()

    def _round_group(
        self,
        module: nn.Module,
        linears: Sequence[LinearTensor],
        weights: Mapping[str, Tensor],
        statistics: InputStatistics,
        stored: Iterator[tuple[str, Tensor]],
    ) -> Iterator[Rounded]:
        """Round layers that share an input, into the module too; `stored` gives their tensors' bytes in turn."""
        assert statistics.gram is not None
        curvature = factor_gram(statistics.gram, self.options.damping)
        for together in self._at_once(linears):
            dense = [self._dense(*next(stored)) for _ in together]
            targets = [self._target(matrix, curvature, statistics) for matrix in dense]
            codec = CODECS[self.job.types[together[0].tensor]]
            target = targets[0] if len(targets) == 1 else torch.cat(targets)
            found = quantize(codec.ggml_type, target, curvature, self.options)
            for linear, matrix, part in zip(together, dense, split(*found, [len(each) for each in dense]), strict=True):
                own = BlockMatrix(codec, *part)
                rounded = own.dequantize()
                self._place(module, linear, weights, matrix, rounded)
                yield Rounded(linear, matrix, own, _relative(matrix, rounded, curvature))

    def _learned(
        self, rounded: Mapping[str, Rounded], arriving: Passage, targets: Activations, options: LearnOptions
    ) -> Iterator[Rounded]:
        """The block's layers after training; the module has them too. `targets`: the original block's outputs."""
        matrices = {}
        for name, one in rounded.items():
            back = torch.argsort(self.orders[name])  # to the checkpoint's order of rows, in which the block computes
            matrices[name] = LearnedBlocks(one.dense[back], one.matrix.rows(back))
        progress, model, module = self.job.progress, self.model, arriving.module
        learned = train_block(model, arriving.index, module, matrices, arriving.states, targets, options, progress.note)
        if learned.kept_start:
            progress.warn(f"{model.block_path(arriving.index)}: {kept_start(learned)}")
        for name, one in rounded.items():
            matrix = learned.tensors[name]
            if not learned.kept_start:
                place_weight(model, module, name, matrix.dequantize())
            yield replace(one, matrix=matrix.rows(self.orders[name]))

    def _at_once(self, linears: Sequence[LinearTensor]) -> list[list[LinearTensor]]:
        """Neighbours of one type that a GPU rounds as one matrix, which leaves fewer of its processors idle; on a CPU every
        layer by itself."""
        runs: list[list[LinearTensor]] = []
        for linear in linears:
            alike = [*(runs[-1] if runs else []), linear]
            size = sum(math.prod(self.job.source.tensors[each.tensor].shape) for each in alike)
            fits = self.model.device.type == "cuda" and size <= CUDA_WEIGHTS
            if runs and fits and len({self.job.types[each.tensor] for each in alike}) == 1:
                runs[-1] = alike
            else:
                runs.append([linear])
        return runs

    def _dense(self, tensor: str, stored: Tensor) -> Tensor:
        """A tensor's bytes as float32 on the device; they travel as they are stored."""
        return dequantized(stored.to(self.model.device), self.job.source.tensors[tensor])

    def _target(self, dense: Tensor, curvature: Curvature, statistics: InputStatistics) -> Tensor:
        """What the rows are rounded towards."""
        if statistics.cross is None:
            return dense
        return toward_original(dense, curvature, statistics.cross, self.options.asymmetric)

    def _place(
        self, module: nn.Module, linear: LinearTensor, weights: Mapping[str, Tensor], dense: Tensor, rounded: Tensor
    ) -> None:
        """Give the module the rounded weight [out, in], rows back in the order of the checkpoint."""
        stored = weights[f"{linear.name}.weight"]
        if self.model.architecture.transposed:
            stored = stored.T
        order = self._row_order(linear.name, stored, dense)
        if order is None:
            raise CheckpointError(
                f"{linear.tensor} is not {linear.path} with its rows moved: the converter changed its values",
                hint="--refine imatrix, or none",
            )
        ordered = torch.empty_like(rounded)
        ordered[order] = rounded
        place_weight(self.model, module, linear.name, ordered)

    def _row_order(self, name: str, stored: Tensor, dense: Tensor) -> Tensor | None:
        """row_order on the device; blocks are alike, and to look for rows takes far longer than to see that they are there."""
        known = self.orders.get(name)
        if known is not None and len(known) == len(stored) == len(dense):
            moved = stored.to(torch.float16)[known]
            if torch.equal(moved, dense.to(torch.float16)):
                return known
        order = row_order(stored, dense)
        if order is None:
            return None
        self.orders[name] = order.to(dense.device)
        return self.orders[name]

    def _restore(self, module: nn.Module, own: Mapping[str, LinearTensor], weights: Mapping[str, Tensor]) -> None:
        """Put what an earlier run wrote into the module."""
        for linear in own.values():
            dense = self._dense(linear.tensor, self.job.source.stored(linear.tensor))
            self._place(module, linear, weights, dense, self._written(linear.tensor))

    def _written(self, tensor: str) -> Tensor:
        from lowbit.core.ggml_types import ggml_type

        rows, columns = self.job.source.tensors[tensor].shape
        row_bytes = ggml_type(self.job.types[tensor]).row_bytes(columns)
        data = self.job.writer.read(tensor, rows * row_bytes).view(rows, row_bytes)
        return decode(self.job.types[tensor], data, columns).to(self.model.device)

    def _embedding(self) -> Tensor | None:
        """The token embedding as it was written, which is what the first block will really be fed by."""
        name = "token_embd.weight"
        tensor = self.job.source.tensors.get(name)
        if tensor is None or self.job.types[name] == tensor.ggml_type:
            return None
        table = self._written(name)
        return table if tuple(table.shape) == tuple(_embedding_shape(self.model)) else None


def _watched(arriving: Passage, original: Passage | None, name: str, until: int) -> InputStatistics:
    """Statistics of the named layer's inputs, beside those in the unquantized model, whose states go on in the same pass."""
    shape = arriving.module.get_submodule(name).get_parameter("weight").shape
    columns = shape[0 if arriving.model.architecture.transposed else 1]
    statistics = InputStatistics(columns, arriving.model.device, cross=original is not None)
    compared: Iterator[dict[str, Tensor]] = repeat({})
    if original is not None:
        compared = original.inputs([name], on_to=until if until > original.at else None)
    for given, beside in zip(arriving.inputs([name]), compared, strict=original is not None):
        statistics.add(given[name], beside.get(name))
    statistics.finish()
    return statistics


def _embedding_shape(model: StreamedModel) -> tuple[int, ...]:
    return tuple(model.skeleton.get_input_embeddings().weight.shape)


def _relative(weight: Tensor, rounded: Tensor, curvature: Curvature) -> float:
    with tensor_float32_products(weight.device):
        total = output_powers(weight, curvature.hessian).sum().clamp_min(1e-30)
        return (output_powers(weight - rounded, curvature.hessian).sum() / total).item()
