"""Reading checkpoints, and refusing broken ones with one clear error."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.checkpoint.safetensors import SafetensorsCheckpoint, read_header
from lowbit.core.errors import CheckpointError


def test_reads_what_the_library_reads(tiny_llama: Path) -> None:
    ours = open_checkpoint(tiny_llama)
    theirs = load_file(tiny_llama / "model.safetensors")
    assert set(ours.tensors) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours.read(name), tensor)
        assert (ours.tensors[name].dtype, ours.tensors[name].shape) == (tensor.dtype, tuple(tensor.shape))


def test_reads_shards(make_model: Callable[..., Path]) -> None:
    folder = make_model(max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    ours = open_checkpoint(folder)
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(ours.read(name), tensor)


def test_missing_shard_is_named(make_model: Callable[..., Path]) -> None:
    folder = make_model(max_shard_size="100KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(64, 64)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_checkpoint(tmp_path)


def test_pickle_is_refused_with_the_command_that_converts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickled") as caught:
        open_checkpoint(tmp_path)
    assert "save_pretrained" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "message"),
    [("/nowhere/at/all", "does not exist"), ("model.gguf", "does not exist"), ("what is this", "does not exist")],
)
def test_missing_paths(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(name)


def test_identity_changes_with_the_weights(make_model: Callable[..., Path]) -> None:
    one, other = make_model(seed=0), make_model(seed=1)
    assert open_checkpoint(one).identity() == open_checkpoint(one).identity()
    assert open_checkpoint(one).identity() != open_checkpoint(other).identity()


VALID = st.dictionaries(
    st.text(max_size=12),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "I4", "", "F8_E4M3"]),
            "shape": st.lists(st.integers(-5, 2**62), max_size=5),
            "data_offsets": st.lists(st.integers(-5, 2**62), max_size=3),
        }
    )
    | st.none()
    | st.integers(),
    max_size=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    header=VALID | st.lists(st.integers()), length=st.none() | st.integers(0, 2**64 - 1), tail=st.binary(max_size=64)
)
def test_any_header_is_read_or_refused(tmp_path: Path, header: object, length: int | None, tail: bytes) -> None:
    text = json.dumps(header).encode()
    file = tmp_path / "fuzz.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + tail)
    try:
        entries, _ = read_header(file)
    except CheckpointError:
        return
    for spec, offset in entries.values():
        assert 0 <= offset <= offset + spec.nbytes <= file.stat().st_size


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 5000),
)
def test_damaged_files_are_read_or_refused(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(16, 16), "b": torch.zeros(8, dtype=torch.int32)}, file)
    data = bytearray(file.read_bytes())
    for position, value in flips:
        data[position % len(data)] = value
    file.write_bytes(bytes(data[: max(1, len(data) - cut % 50)]))
    try:
        checkpoint = SafetensorsCheckpoint(tmp_path)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except CheckpointError:
        pass


def test_gguf_equals_transformers(smollm2_gguf: Path) -> None:
    """The real GGUF file, dequantized and renamed, tensor by tensor as transformers does it as a whole."""
    from transformers import AutoModelForCausalLM, GgufConfig

    ours = open_checkpoint(smollm2_gguf)
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent,
        gguf_file=smollm2_gguf.name,
        dtype=torch.float16,
        quantization_config=GgufConfig(dequantize=True),
    ).state_dict()
    assert set(ours.tensors) == set(theirs) - {"lm_head.weight"}
    for name in ["model.embed_tokens.weight", "model.norm.weight"] + [n for n in theirs if ".layers.7." in n]:
        assert torch.equal(ours.read(name), theirs[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="reading ahead ends on a GPU")
def test_reading_ahead_gives_the_same_tensors_and_the_same_errors(tiny_llama: Path, tmp_path: Path) -> None:
    from lowbit.core.checkpoint.prefetch import Prefetching

    plain = open_checkpoint(tiny_llama)
    ahead = Prefetching(plain, torch.device("cuda"))
    names = list(plain.tensors)
    ahead.announce([*names[:5], "no.such.tensor"])
    for name in names:
        assert torch.equal(ahead.read(name).cpu(), plain.read(name))
    with pytest.raises(CheckpointError, match="no tensor"):
        ahead.read("no.such.tensor")
    assert torch.equal(ahead.read(names[0]), plain.read(names[0]))
