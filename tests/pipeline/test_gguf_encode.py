"""Tensors on their way from one GGUF file into another."""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.core import staging
from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.core.errors import CheckpointError, OutputError
from lowbit.core.progress import Silent
from lowbit.formats.gguf import PlannedTensor, lay_out
from lowbit.formats.gguf_imatrix import Importance
from lowbit.methods.kquants import encode
from lowbit.pipeline import gguf_encode
from lowbit.pipeline.gguf_encode import GgufJob, encode_tensors
from lowbit.pipeline.gguf_writer import GgufWriter
from lowbit.pipeline.journal import Journal

TYPES = {"a": "Q4_K", "b": "Q6_K", "norm": "F32", "c": "Q3_K", "d": "F16"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> GgufSource:
    file = tmp_path_factory.mktemp("source") / "s.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    g = np.random.default_rng(0)
    for name in TYPES:
        values = g.standard_normal(300 if name == "norm" else (24, 512), dtype=np.float32)
        writer.add_tensor(name, values if name == "norm" else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufSource(file)


def job_in(folder: Path, source: GgufSource, device: str = "cpu") -> GgufJob:
    planned = [PlannedTensor(name, source.tensors[name].shape, kind) for name, kind in TYPES.items()]
    writer = GgufWriter(folder, lay_out("m.gguf", {}, planned))
    return GgufJob(source, TYPES, writer, Journal(folder, {}), torch.device(device), Silent())


def some_importance() -> dict[str, Importance]:
    g = torch.Generator().manual_seed(0)
    return {name: Importance(torch.rand(1, 512, generator=g), torch.ones(1)) for name in ("a", "c")}


def expected_bytes(source: GgufSource, name: str) -> bytes:
    if TYPES[name] == source.tensors[name].ggml_type:
        return source.stored(name).numpy().tobytes()
    given = some_importance().get(name)
    return encode(TYPES[name], source.dense(name), None if given is None else given.means()[0]).numpy().tobytes()


def assert_all_written(job: GgufJob) -> None:
    for name in TYPES:
        expected = expected_bytes(job.source, name)
        assert job.writer.read(name, len(expected)).numpy().tobytes() == expected, name
        assert job.is_done(name)
    file = job.writer.directory / "m.gguf"
    assert job.writer.finish() == {"m.gguf": hashlib.sha256(file.read_bytes()).hexdigest()}


@pytest.mark.parametrize("sync_bytes", [1, 10_000, 1 << 28])
def test_every_tensor_gets_its_bytes(
    source: GgufSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_bytes: int
) -> None:
    monkeypatch.setattr(gguf_encode, "_SYNC_BYTES", sync_bytes)
    job = job_in(tmp_path, source)
    encode_tensors(job, list(TYPES), some_importance())
    assert_all_written(job)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("piece", [1000, 1 << 20])
def test_every_tensor_gets_the_same_bytes_on_a_gpu(
    source: GgufSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(staging, "_PIECE", piece)
    job = job_in(tmp_path, source, "cuda")
    encode_tensors(job, list(TYPES), some_importance())
    assert_all_written(job)


def test_what_could_not_be_made_safe_does_not_count_as_done(
    source: GgufSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_encode, "_SYNC_BYTES", 1)
    job = job_in(tmp_path, source)

    def fail() -> None:
        raise OutputError("the disk went away")

    monkeypatch.setattr(job.writer, "sync", fail)
    with pytest.raises(OutputError, match="went away"):
        encode_tensors(job, list(TYPES))
    assert not any(job.is_done(name) for name in TYPES)
    assert not Journal(tmp_path, {}).blocks


def test_provisional_tensors_do_not_count_as_done_and_are_hashed_as_they_end(
    source: GgufSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_encode, "_SYNC_BYTES", 1)
    job = job_in(tmp_path, source)
    encode_tensors(job, list(TYPES), provisional=["a"])
    assert not job.is_done("a")
    encode_tensors(job, ["a"], some_importance())
    encode_tensors(job_in(tmp_path / "other", source), list(TYPES))
    file = tmp_path / "m.gguf"
    assert job.writer.finish() == {"m.gguf": hashlib.sha256(file.read_bytes()).hexdigest()}


def two_files(folder: Path) -> tuple[GgufWriter, dict[str, Tensor]]:
    planned = [PlannedTensor(name, (40, 100), "F32") for name in "abcdef"]
    data = {name: torch.randint(256, (16_000,), dtype=torch.uint8) for name in "abcdef"}
    return GgufWriter(folder, lay_out("m.gguf", {}, planned, max_shard=60_000)), data


@pytest.mark.parametrize("order", ["abcdef", "fedcba", "bdacfeab"])
def test_hashes_are_those_of_the_files_in_whatever_order_they_were_filled(tmp_path: Path, order: str) -> None:
    writer, data = two_files(tmp_path)
    for name in order:
        data[name] ^= 1  # whatever is written again has changed
        writer.write_pieces(name, data[name].split(7_000))
        writer.hash_ahead()
    digests = writer.finish()
    assert len(digests) == 2
    assert digests == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in digests}
    for name, expected in data.items():
        assert torch.equal(writer.read(name, 16_000), expected)


def test_hashing_stops_at_what_is_not_written(tmp_path: Path) -> None:
    writer, data = two_files(tmp_path)
    first = writer.files[0]
    for name in "acd":
        writer.write(name, data[name])
    writer.hash_ahead()
    assert writer._digests[first.name].end == first.offsets["b"]


def test_bytes_are_read_from_anywhere_in_a_tensor(source: GgufSource) -> None:
    whole = source.stored("b")
    part = torch.empty(1234, dtype=torch.uint8)
    source.read_into("b", 77, part)
    assert torch.equal(part, whole[77 : 77 + 1234])


def test_a_file_that_became_shorter_is_an_error(source: GgufSource, tmp_path: Path) -> None:
    copied = tmp_path / "s.gguf"
    copied.write_bytes(source.location.read_bytes())
    shrunk = GgufSource(copied)
    copied.write_bytes(copied.read_bytes()[:-5_000])
    with pytest.raises(CheckpointError, match="became shorter"):
        shrunk.stored("d")
