"""What `plan` finds out, chooses and refuses before a byte of weights is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.api.serve import plan
from lowbit.core.errors import LowbitError
from lowbit.runtimes.description import BitsAndBytes, ServeOptions
from lowbit.runtimes.machine import Gpu, Machine

pytest.importorskip("xllamacpp")

ANY_PORT = ServeOptions(port=0)
CPU = Machine(cores=2, memory=8 * 2**30)
GIB = 2**30


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def artifact(smollm2_gguf: Path, tmp_path: Path) -> Path:
    """A GGUF file with a record of its checksum beside it."""
    file = tmp_path / "model.gguf"
    shutil.copy(smollm2_gguf, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "model.lowbit.json").write_text(json.dumps({"checksums": {"model.gguf": digest}}))
    return file


def test_gguf_goes_to_llama_cpp_on_all_cores(artifact: Path) -> None:
    planned = plan(artifact, options=ANY_PORT, machine=CPU)
    assert planned.choice.runtime.name == "llama.cpp"
    assert (planned.options.threads, planned.options.context) == (2, 4096)
    assert planned.memory is not None
    assert planned.memory.total < CPU.memory
    assert planned.url == f"http://127.0.0.1:{planned.options.port}/v1"


def test_an_installed_llama_server_gets_the_same_flags(artifact: Path, tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    embedded = plan(artifact, options=ANY_PORT, machine=CPU)
    installed = plan(artifact, options=ServeOptions(port=embedded.options.port), runtime="llama.cpp", program=program,
                     machine=CPU)  # fmt: skip
    assert installed.argv[0] == str(program)
    assert installed.argv[1:] == embedded.argv[3:]


def test_the_key_goes_by_a_variable(artifact: Path) -> None:
    planned = plan(artifact, options=ServeOptions(port=0, host="0.0.0.0"), key="secret", machine=CPU)
    assert "secret" not in " ".join(planned.argv)
    assert planned.variables()["LLAMA_API_KEY"] == "secret"
    assert planned.url.startswith("http://127.0.0.1:")


REFUSALS: list[tuple[str, dict[str, Any], str, str]] = [
    ("/nowhere.gguf", {}, "does not exist", "gguf"),
    ("GGUF", {"options": ServeOptions(port=0, host="0.0.0.0")}, "reached from other machines", "--api-key"),
    ("GGUF", {"options": ServeOptions(port=0, host="::")}, "reached from other machines", "--insecure"),
    ("GGUF", {"runtime": "vllm"}, "no runtime can serve", "llama.cpp"),
    ("DENSE", {"runtime": "llama.cpp"}, "no runtime can serve", "it reads gguf"),
    ("DENSE", {"runtime": "tensorrt-llm"}, "no runtime can serve", "needs an NVIDIA GPU"),
    ("GGUF", {"runtime": "vlm"}, "did you mean 'vllm'", "one of"),
    ("GGUF", {"options": ServeOptions(port=0, context=100_000)}, "made for 8192 tokens", "--context 8192"),
    ("GGUF", {"options": ServeOptions(port=0, context=8192, parallel=64)}, "8.00 GiB are free", "--context"),
    ("GGUF", {"options": ServeOptions(port=0, bitsandbytes=BitsAndBytes(8))}, "quantized already", "unquantized"),
    ("GGUF", {"device": "cuda"}, "no NVIDIA GPU", "--device cpu"),
    ("GGUF", {"program": Path("/nowhere/llama-server")}, "not a program", "path"),
]


@pytest.mark.parametrize(("model", "asked", "error", "hint"), REFUSALS)
def test_refusals_name_what_would_do(
    model: str, asked: dict[str, Any], error: str, hint: str, artifact: Path, tiny_llama: Path
) -> None:
    path = {"GGUF": artifact, "DENSE": tiny_llama}.get(model, Path(model))
    with pytest.raises(LowbitError) as raised:
        plan(path, **{"options": ANY_PORT, "machine": CPU, **asked})
    assert error in raised.value.message
    assert hint in (raised.value.hint or "")


def test_the_context_that_is_named_fits(artifact: Path) -> None:
    tight = Machine(cores=2, memory=GIB)
    with pytest.raises(LowbitError) as raised:
        plan(artifact, options=ServeOptions(port=0, context=8192, parallel=8), machine=tight)
    fits = int((raised.value.hint or "").split()[1].rstrip(","))
    assert 0 < fits < 8192
    planned = plan(artifact, options=ServeOptions(port=0, context=fits, parallel=8), machine=tight)
    assert planned.memory is not None
    assert planned.memory.total <= tight.memory


def test_a_taken_port(artifact: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LowbitError, match="Address already in use") as raised:
            plan(artifact, options=ServeOptions(port=taken.getsockname()[1]), machine=CPU)
    assert "--port 0" in (raised.value.hint or "")


def test_a_changed_artifact(artifact: Path) -> None:
    plan(artifact, options=ANY_PORT, machine=CPU)
    with artifact.open("r+b") as stream:
        stream.seek(-100, os.SEEK_END)
        stream.write(b"changed")
    with pytest.raises(LowbitError, match=r"model.gguf in .* differ from their checksums"):
        plan(artifact, options=ANY_PORT, machine=CPU)
    plan(artifact, options=ANY_PORT, machine=CPU, verify=False)


def test_a_broken_off_download(smollm2_gguf: Path, tiny_llama: Path, tmp_path: Path) -> None:
    part = tmp_path / "part.gguf"
    part.write_bytes(smollm2_gguf.read_bytes()[:5_000_000])
    with pytest.raises(LowbitError, match="truncated"):
        plan(part, machine=CPU)
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(LowbitError, match="truncated"):
        plan(folder, machine=CPU)


def test_gpus_count_by_what_is_free(make_model: Callable[..., Path]) -> None:
    model, program = make_model(), Path(shutil.which("true") or "/bin/true")

    def planned_on(free: int) -> Any:
        machine = Machine(8, 64 * GIB, (Gpu("NVIDIA L4", 89, 24 * GIB, free),) * 4)
        options = ServeOptions(port=0, tensor_parallel=0, context=256)
        return plan(model, runtime="vllm", options=options, machine=machine, program=program)

    planned = planned_on(20 * GIB)
    assert (planned.choice.device, planned.options.tensor_parallel) == ("cuda", 1)
    assert planned.argv[planned.argv.index("--gpu-memory-utilization") + 1] == "0.83"  # 20 of 24 GiB, not 0.9
    with pytest.raises(LowbitError, match="GiB are free"):
        planned_on(GIB)
