"""Reading a GGUF file while a converter writes it. The converter is a stand-in that writes a real file in pieces: llama.cpp's
own is in a side environment, and does not know the tokenizers of tiny models."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

import lowbit
from lowbit.api import gguf_conversion
from lowbit.api.gguf_conversion import converted, converting
from lowbit.api.run import Settings
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.core.errors import CheckpointError, SideEnvironmentError
from lowbit.core.progress import Silent
from tests.gguf_files import write_gguf

_CONVERTER = """#!{python}
import sys, time
target = sys.argv[sys.argv.index("--outfile") + 1]
data = open({source!r}, "rb").read()
stop = int(len(data) * {share})
with open(target, "wb", buffering=0) as file:
    for start in range(0, stop, 1 + len(data) // 40):
        file.write(data[start : min(stop, start + 1 + len(data) // 40)])
        time.sleep({pause})
print("the disk is full", file=sys.stderr)
sys.exit({code})
"""


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path]) -> Path:
    return make_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / "tiny-f16.gguf")


@pytest.fixture
def converter(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """converter(share=1.0, code=0, pause=0.02): stands in for llama.cpp's, gives a share of the file and then an exit code."""

    def stand_in(share: float = 1.0, code: int = 0, pause: float = 0.02, source: Path = finished) -> None:
        script = tmp_path / "python"
        script.write_text(
            _CONVERTER.format(python=sys.executable, source=str(source), share=share, code=code, pause=pause)
        )
        script.chmod(0o755)
        monkeypatch.setattr(gguf_conversion, "python_of", lambda name: script)

    return stand_in


def test_tensors_are_read_while_the_file_grows(
    folder: Path, finished: Path, tmp_path: Path, converter: Callable[..., None]
) -> None:
    converter(pause=0.05)
    whole = GgufSource(finished)
    with converting(open_checkpoint(folder), tmp_path, Silent()) as source:
        early = (tmp_path / "source.partial.gguf").stat().st_size
        assert early < finished.stat().st_size
        assert list(source.tensors) == list(whole.tensors)
        for name in source.tensors:
            assert source.stored(name).equal(whole.stored(name))
    assert (tmp_path / "source.gguf").read_bytes() == finished.read_bytes()
    converter(code=1)  # nothing is converted again
    assert converted(open_checkpoint(folder), tmp_path, Silent()).wait_for is None


def test_the_artifact_is_that_of_the_whole_file(
    folder: Path, finished: Path, tmp_path: Path, converter: Callable[..., None]
) -> None:
    converter()
    for model, name in ((folder, "followed"), (finished, "whole")):
        lowbit.quantize(
            model, output=tmp_path / f"{name}.gguf", method="q4_k_m", settings=Settings(verify=False),
            options={"refine": "none"},
        )  # fmt: skip
    followed, whole = (GgufSource(tmp_path / f"{name}.gguf") for name in ("followed", "whole"))
    assert all(followed.stored(name).equal(whole.stored(name)) for name in whole.tensors)
    assert not list(tmp_path.glob(".followed*"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.6])
def test_a_converter_that_fails_is_quoted(
    folder: Path, tmp_path: Path, converter: Callable[..., None], share: float
) -> None:
    converter(share=share, code=3)
    with pytest.raises(SideEnvironmentError, match="the disk is full"):
        converted(open_checkpoint(folder), tmp_path, Silent())
    assert not list(tmp_path.glob("source*"))
    with pytest.raises(SideEnvironmentError, match="the disk is full"):
        lowbit.quantize(
            folder,
            output=tmp_path / "m.gguf",
            method="q8_0",
            settings=Settings(verify=False),
            options={"refine": "none"},
        )
    assert not (tmp_path / "m.gguf").exists()


def test_a_file_that_ends_early_is_refused(folder: Path, tmp_path: Path, converter: Callable[..., None]) -> None:
    converter(share=0.6)
    with pytest.raises(SideEnvironmentError, match="could not convert"):
        converted(open_checkpoint(folder), tmp_path, Silent())


def test_leaving_early_ends_the_converter(folder: Path, tmp_path: Path, converter: Callable[..., None]) -> None:
    converter(pause=1.0)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), converting(open_checkpoint(folder), tmp_path, Silent()):
        raise KeyboardInterrupt
    assert time.monotonic() - started < 20
    size = (tmp_path / "source.partial.gguf").stat().st_size
    time.sleep(1.2)
    assert (tmp_path / "source.partial.gguf").stat().st_size == size
    assert not (tmp_path / "source.gguf").exists()


def test_a_conversion_without_weights_is_refused(folder: Path, tmp_path: Path, converter: Callable[..., None]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "empty", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    converter(source=tmp_path / "empty")
    with pytest.raises(CheckpointError, match="found no weights"):
        converted(open_checkpoint(folder), tmp_path, Silent())
