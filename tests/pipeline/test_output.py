"""Writing in the background: the journal says no more than the disk holds, hashes are those of the files, errors come out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit.core.checkpoint.safetensors import read_header
from lowbit.core.contracts import TensorSpec
from lowbit.core.errors import OutputError
from lowbit.pipeline.journal import Journal
from lowbit.pipeline.output import WrittenOutput
from lowbit.pipeline.writer import ShardedWriter

REPORT: dict[str, object] = {"errors": {}, "notes": {}}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(8, 8, generator=generator).to((torch.half, torch.float32)[i % 2]) for i in range(6)}


def layout() -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors().items()}


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 4, 2]])
@pytest.mark.parametrize("limit", [10**9, 300])
def test_hashes_taken_on_the_way_are_those_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[int], limit: int
) -> None:
    monkeypatch.setattr("lowbit.pipeline.writer.MAX_SHARD", limit)
    writer = ShardedWriter(tmp_path, layout())
    for number in order:
        writer.write(f"t{number}", tensors()[f"t{number}"])
        writer.hash_ahead()
    writer.write("t1", tensors()["t1"] + 1)  # after it was hashed
    checksums = writer.finish()
    assert checksums == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.glob("*.safetensors")
    }


def test_what_is_written_in_order_is_hashed_up_to_its_end(tmp_path: Path) -> None:
    writer, every = ShardedWriter(tmp_path, layout()), tensors()
    start = (tmp_path / "model.safetensors").stat().st_size - sum(tensor.nbytes for tensor in every.values())
    for name, tensor in every.items():
        writer.write(name, tensor)
        writer.hash_ahead()
        start += tensor.nbytes
        assert [digest.end for digest in writer._digests.values()] == [start]


def test_tensors_lie_at_multiples_of_their_width(tmp_path: Path) -> None:
    shapes = {"a": (torch.uint8, 3), "b": (torch.half, 5), "c": (torch.float32, 2), "d": (torch.uint8, 1)}
    written = {name: torch.arange(count).to(dtype) for name, (dtype, count) in shapes.items()}
    writer = ShardedWriter(tmp_path, {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in written.items()})
    for name, tensor in written.items():
        writer.write(name, tensor)
    writer.finish()
    entries, _ = read_header(tmp_path / "model.safetensors")
    assert all(offset % spec.dtype.itemsize == 0 for spec, offset in entries.values())
    assert all(torch.equal(tensor, written[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())


class _Watched(ShardedWriter):
    """Notes what was on disk when it was told to make that safe; cannot do so from the second time on."""

    synced = 0

    def sync(self) -> None:
        self.synced += 1
        if self.synced == 2:
            raise OutputError("the disk is full")


def test_an_error_in_the_background_comes_out_and_the_journal_does_not_lie(tmp_path: Path) -> None:
    output = WrittenOutput(_Watched(tmp_path, layout()), Journal(tmp_path, {}))
    output.block(0, lambda: iter([("t0", tensors()["t0"])]), REPORT)
    output.block(1, lambda: iter([("t1", tensors()["t1"])]), REPORT)
    with pytest.raises(OutputError, match="full"):
        output.block(2, lambda: iter([("t2", tensors()["t2"])]), REPORT)
    assert list(Journal(tmp_path, {}).blocks) == [0]
