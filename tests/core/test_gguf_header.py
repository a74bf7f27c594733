"""Damaged and hostile GGUF headers: an error that says so, never a crash, never memory that the file does not have."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit.core.checkpoint.gguf_header import read_gguf_header
from lowbit.core.errors import CheckpointError

MEMORY = 8 * 2**20
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every kind of value."""
    file = tmp_path_factory.mktemp("header") / "real.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_float32("a.float", 1.5)
    writer.add_bool("a.bool", True)
    writer.add_uint64("a.long", 2**40)
    writer.add_int8("a.small", -3)
    writer.add_array("a.texts", ["x", "yz", "ü"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("w", np.zeros((4, 32), dtype=np.float16))
    writer.add_tensor("q", np.zeros((2, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


def attempt(content: bytes, file: Path) -> None:
    """Reads, or refuses with the one error; in little memory either way."""
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with suppress(CheckpointError):
            for tensor in read_gguf_header(file).tensors.values():
                assert tensor.offset + tensor.nbytes <= len(content)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY


def test_the_unharmed_file_reads_as_gguf_py_reads_it(real: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(real)
    header, reader = read_gguf_header(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    for key, value in header.metadata.items():
        assert reader.fields[key].contents() == value
        start, stop = header.spans[key]
        assert key.encode() in real[start:stop]
    assert {t.name: (t.data_offset, t.n_bytes) for t in reader.tensors} == {
        name: (tensor.offset, tensor.nbytes) for name, tensor in header.tensors.items()
    }


@FUZZ
@given(content=st.binary(max_size=400))
def test_random_bytes(content: bytes, tmp_path: Path) -> None:
    attempt(content, tmp_path / "m.gguf")
    attempt(b"GGUF" + struct.pack("<I", 3) + content, tmp_path / "m.gguf")


@FUZZ
@given(data=st.data())
def test_a_real_header_with_bytes_changed(real: bytes, data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(real)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    attempt(bytes(content), tmp_path / "m.gguf")


@FUZZ
@given(data=st.data())
def test_a_real_header_with_a_huge_number_in_it(real: bytes, data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(real)
    place = data.draw(st.integers(0, len(content) - 8))
    huge = data.draw(st.sampled_from([2**64 - 1, 2**63, 2**62 + 1, 2**32, 2**31 - 1, 2**40]))
    content[place : place + 8] = struct.pack("<Q", huge)
    attempt(bytes(content), tmp_path / "m.gguf")


def test_a_file_cut_anywhere_in_its_header_is_refused(real: bytes, tmp_path: Path) -> None:
    for length in range(0, len(real) - 32, 7):  # the last bytes are padding
        (tmp_path / "m.gguf").write_bytes(real[:length])
        with pytest.raises(CheckpointError):
            read_gguf_header(tmp_path / "m.gguf")


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header_of(pairs: list[bytes] = [], tensors: list[bytes] = []) -> bytes:  # noqa: B006 - never changed
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    return start + b"".join(pairs) + b"".join(tensors) + bytes(4096)


def tensor(name: bytes, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


@pytest.mark.parametrize("content", [
    header_of(pairs=[text(b"k") + struct.pack("<II", 4, 1)] * 2),
    header_of(tensors=[tensor(b"t", [4])] * 2),
    header_of(tensors=[tensor(b"t", [2**32, 2**32, 2**32])]),
    header_of(tensors=[tensor(b"t", [2**63, 2])]),
    header_of(tensors=[tensor(b"t", [4], offset=2**64 - 16)]),
    header_of(tensors=[tensor(b"t", [0])]),
    header_of(tensors=[tensor(b"t", [31], kind=8)]),
    header_of(tensors=[tensor(b"t", [4], kind=9999)]),
    header_of(tensors=[tensor(b"t", [1] * 9)]),
    header_of(pairs=[text(b"k") + struct.pack("<IIQ", 9, 4, 2**61)]),
    header_of(pairs=[text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50]),
    header_of(pairs=[text(b"general.alignment") + struct.pack("<II", 4, 0)]),
    header_of(pairs=[text(b"general.alignment") + struct.pack("<II", 4, 2**31)]),
    header_of(pairs=[text(b"\xff\xfe") + struct.pack("<II", 4, 0)]),
    struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 2**63),
    struct.pack("<4sIQQ", b"GGUF", 1, 0, 0),
    struct.pack(">4sIQQ", b"GGUF", 3, 0, 0),
], ids=[
    "duplicate key", "duplicate tensor", "huge shape", "overflowing shape", "offset beyond the end", "empty dimension",
    "row no multiple of its block", "unknown type", "nine dimensions", "huge array", "nested arrays", "alignment 0",
    "huge alignment", "key not UTF-8", "huge counts", "version 1", "big endian",
])  # fmt: skip
def test_hostile_headers_are_refused(content: bytes, tmp_path: Path) -> None:
    attempt(content, tmp_path / "m.gguf")
    with pytest.raises(CheckpointError):
        read_gguf_header(tmp_path / "m.gguf")
