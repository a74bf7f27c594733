"""The importance matrix against a literal run of the whole model, and tensors found again under their GGUF names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.core.progress import Silent
from lowbit.core.streamed_model import StreamedModel
from lowbit.pipeline.gguf_names import linear_tensors, row_order
from lowbit.pipeline.gguf_statistics import importance_matrix
from lowbit.pipeline.gguf_stream import embedded, grams_of
from lowbit.pipeline.run import Streams
from tests.gguf_files import write_gguf


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model()


@pytest.fixture(scope="module")
def source(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> GgufSource:
    return GgufSource(write_gguf(folder, tmp_path_factory.mktemp("gguf") / "m.gguf"))


@pytest.fixture(scope="module")
def model(folder: Path) -> StreamedModel:
    return StreamedModel(open_checkpoint(folder), torch.device("cpu"), torch.float32)


def test_sums_are_those_of_a_literal_run(
    folder: Path, source: GgufSource, model: StreamedModel, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    windows = torch.randint(0, 512, (6, 32), generator=torch.Generator().manual_seed(0))
    streams = Streams(64, 2**30, tmp_path)
    linears = linear_tensors(model, source)
    matrix = importance_matrix(model, linears, windows, "text", streams, Silent())
    assert (matrix.chunks, matrix.chunk_size) == (6, 32)

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_: object, args: tuple[torch.Tensor, ...]) -> None:
            for token in args[0].double().reshape(-1, args[0].shape[-1]):
                sums[path] = sums.get(path, torch.zeros(len(token), dtype=torch.float64)) + token**2

        return hook

    for path in linears:
        whole.get_submodule(path).register_forward_pre_hook(watch(path))
    with torch.no_grad():
        for window in windows:
            whole(window[None])
    assert len(matrix.tensors) == len(linears) == 3 * 7
    for path, linear in linears.items():
        entry = matrix.tensors[linear.tensor]
        assert entry.counts.tolist() == [6 * 32]
        torch.testing.assert_close(entry.sums[0].double(), sums[path], rtol=1e-4, atol=1e-6)


def test_names_and_row_orders(source: GgufSource, model: StreamedModel) -> None:
    linears = linear_tensors(model, source)
    assert linears["model.layers.2.mlp.down_proj"].tensor == "blk.2.ffn_down.weight"
    moved = set()
    for path, linear in linears.items():
        stored = model.checkpoint.read(f"{path}.weight")
        order = row_order(stored, source.dense(linear.tensor))
        assert order is not None
        assert torch.equal(stored.float()[order], source.dense(linear.tensor))
        if not torch.equal(order, torch.arange(len(order))):
            moved.add(linear.name)
    assert moved == {"self_attn.q_proj", "self_attn.k_proj"}


def test_rows_that_are_alike_are_each_used_once() -> None:
    stored = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-0.0, 0.0], [1.0, 2.0]])
    order = row_order(stored, stored[[3, 0, 1, 2]])
    assert order is not None
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert torch.equal(stored[order], stored[[3, 0, 1, 2]])


def test_changed_values_are_noticed() -> None:
    stored = torch.randn(4, 8)
    assert row_order(stored, stored * 2) is None
    assert row_order(stored, stored[[0, 0, 1, 2]]) is None


def test_gram_matrices_are_those_of_a_literal_run(folder: Path, model: StreamedModel, tmp_path: Path) -> None:
    """Every input group of the blocks in one pass each, against the whole model's inputs."""
    from transformers import AutoModelForCausalLM

    windows = torch.randint(0, 512, (5, 32), generator=torch.Generator().manual_seed(0))
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = [group[0] for group in model.architecture.linears]
    seen: dict[str, torch.Tensor] = {}
    for path, module in dense.named_modules():
        if any(path.endswith(f".{name}") for name in names):
            module.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0].flatten(0, 1)}))
    with torch.no_grad():
        dense(windows)
    states = embedded(model, windows, Streams(64, 2**30, tmp_path))
    for index in range(len(model.blocks)):
        with model.block(index) as module:
            grams = grams_of(model, index, module, names, states)
        assert list(grams) == names
        for name, gram in grams.items():
            inputs = seen[f"{model.block_path(index)}.{name}"]
            torch.testing.assert_close(gram, inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-5)
