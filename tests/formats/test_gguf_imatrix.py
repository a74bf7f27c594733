"""Importance matrices: written as gguf-py reads them, read as llama-imatrix writes them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lowbit.core.errors import CheckpointError
from lowbit.formats.gguf_imatrix import Importance, ImportanceMatrix, means_of, read_imatrix, write_imatrix


def matrix() -> ImportanceMatrix:
    generator = torch.Generator().manual_seed(0)
    return ImportanceMatrix(
        {
            "blk.0.attn_q.weight": Importance(torch.rand(1, 64, generator=generator), torch.tensor([512.0])),
            "blk.0.ffn_up_exps.weight": Importance(torch.rand(3, 64, generator=generator), torch.tensor([5.0, 0, 7])),
        },
        ("wiki.txt",),
        4,
        128,
    )


def test_gguf_py_reads_what_is_written(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", matrix())
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["wiki.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 4
    assert reader.fields["imatrix.chunk_size"].contents() == 128
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert sorted(tensors) == [
        f"blk.0.{n}.weight.{k}" for n in ("attn_q", "ffn_up_exps") for k in ("counts", "in_sum2")
    ]
    expected = matrix().tensors["blk.0.ffn_up_exps.weight"]
    assert np.array_equal(tensors["blk.0.ffn_up_exps.weight.in_sum2"], expected.sums.numpy())
    assert np.array_equal(tensors["blk.0.ffn_up_exps.weight.counts"], expected.counts[:, None].numpy())


def test_what_llama_imatrix_writes_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a.txt", "b.txt"])
    writer.add_uint32("imatrix.chunk_count", 9)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("output.weight.in_sum2", np.arange(64, dtype=np.float32)[None])
    writer.add_tensor("output.weight.counts", np.full((1, 1), 32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_imatrix(tmp_path / "i.gguf")
    assert (read.datasets, read.chunks, read.chunk_size) == (("a.txt", "b.txt"), 9, 512)
    means = means_of(read.tensors, "output.weight", 1, 64)
    assert means is not None
    assert torch.equal(means[0], torch.arange(64) / 32)


def test_an_expert_that_saw_no_token_counts_as_ones() -> None:
    means = means_of(matrix().tensors, "blk.0.ffn_up_exps.weight", 3, 64)
    assert means is not None
    assert torch.equal(means[1], torch.ones(64))
    assert means[0].max() < 1


def test_an_entry_of_another_size_is_refused_and_a_missing_one_is_none() -> None:
    with pytest.raises(CheckpointError, match=r"the model \[1, 128\]"):
        means_of(matrix().tensors, "blk.0.attn_q.weight", 1, 128)
    assert means_of(matrix().tensors, "blk.9.attn_q.weight", 1, 64) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_sums_that_cannot_be_are_refused(tmp_path: Path, bad: float) -> None:
    wrong = matrix()
    wrong.tensors["blk.0.attn_q.weight"].sums[0, 3] = bad
    write_imatrix(tmp_path / "i.gguf", wrong)
    with pytest.raises(CheckpointError, match="NaN, infinity or a negative"):
        read_imatrix(tmp_path / "i.gguf")


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="no importance matrix"):
        read_imatrix(tmp_path / "m.gguf")
