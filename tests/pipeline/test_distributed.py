"""Two processes share one model's windows and rows: the same artifact as one process makes, or one clear error."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.distributed import ALONE, World, check_windows
from lowbit.core.errors import RecipeError
from lowbit.core.statistics import InputStatistics
from lowbit.formats.reader import ArtifactCheckpoint
from tests.in_process import Run

CPU = torch.device("cpu")
FLAGS = [
    "--bits",
    "4",
    "--group-size",
    "32",
    "--dataset",
    "pydoc",
    "--num-samples",
    "10",
    "--seq-len",
    "64",
    "--no-verify",
]


def command(model: Path, output: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "lowbit", "quantize", str(model), "-o", str(output), *FLAGS, *flags]


def run(arguments: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)


def agreement(first: Path, second: Path, within: str = "") -> tuple[float, float]:
    """(share of equal codes, largest share by which a layer's dequantized weights differ) of layers under a path."""
    left, right = (ArtifactCheckpoint(open_checkpoint(path), torch.float32) for path in (first, second))
    assert set(left.modules) == set(right.modules)
    equal = count = 0
    apart = 0.0
    for name in (name for name in left.modules if name.startswith(within)):
        ours, theirs = left.qtensor(name), right.qtensor(name)
        equal += int((ours.codes == theirs.codes).sum())
        count += ours.codes.numel()
        apart = max(apart, float((ours.dequantize() - theirs.dequantize()).norm() / theirs.dequantize().norm()))
    return equal / count, apart


@pytest.fixture(scope="module")
def deep(make_model: Callable[..., Path]) -> Path:
    """With blocks enough to be killed in the midst of them, and a layer so wide that processes share its factor."""
    return make_model(num_hidden_layers=8, intermediate_size=2048)


@pytest.fixture(scope="module")
def shared(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of it, undisturbed."""
    output = tmp_path_factory.mktemp("shared") / "out"
    done = run(command(deep, output, "--device", "cpu", "--gpus", "2", "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(output), "one process prints, and only it"
    assert list(output.parent.iterdir()) == [output]
    return output


def check_alike(one: Path, two: Path) -> None:
    """The same, but for the order of a float32 sum."""
    # before any weight can have moved nothing else differs
    codes, apart = agreement(one, two, "model.layers.0.self_attn.")
    assert codes > 0.999
    assert apart < 0.01
    # a weight that lies between two codes moves on one processor and not on another; whatever comes after it is given other
    # inputs, and rounds to other codes that are as good
    alone, both = (json.loads((path / "lowbit.json").read_text())["layers"] for path in (one, two))
    for path, layer in alone.items():
        assert both[path]["error"] == pytest.approx(layer["error"], rel=0.2)
    first, second = (statistics.fmean(layer["error"] for layer in layers.values()) for layers in (alone, both))
    assert second == pytest.approx(first, rel=0.02)


def test_two_processes_make_what_one_makes(lowbit_here: Run, deep: Path, shared: Path, tmp_path: Path) -> None:
    alone = lowbit_here("quantize", deep, "-o", tmp_path / "one", *FLAGS, "--device", "cpu")
    assert alone.returncode == 0, alone.stderr
    check_alike(tmp_path / "one", shared)


def test_torchrun_itself_starts_them(lowbit_here: Run, tiny_llama: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lowbit", "quantize"]
    flags = [*FLAGS, "--method", "awq", "--device", "cpu"]
    done = run([*torchrun, str(tiny_llama), "-o", str(tmp_path / "two"), *flags])
    assert done.returncode == 0, done.stderr
    alone = lowbit_here("quantize", tiny_llama, "-o", tmp_path / "one", *flags)
    assert alone.returncode == 0, alone.stderr
    check_alike(tmp_path / "one", tmp_path / "two")


def test_a_scale_of_the_whole_matrix_is_chosen_by_one_process(
    lowbit_here: Run, tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "nvfp4.yaml"
    recipe.write_text("{method: gptq, kind: nvfp4, bits: 4, group_size: 16, format: compressed-tensors}")
    flags = ["--recipe", str(recipe), "--group-size", "16", "--device", "cpu"]
    done = run(command(tiny_llama, tmp_path / "two", *flags, "--gpus", "2"))
    assert done.returncode == 0, done.stderr
    alone = lowbit_here("quantize", tiny_llama, "-o", tmp_path / "one", *FLAGS, *flags)
    assert alone.returncode == 0, alone.stderr
    check_alike(tmp_path / "one", tmp_path / "two")


def test_a_killed_process_ends_the_run_with_one_sentence_and_it_resumes(
    deep: Path, shared: Path, tmp_path: Path
) -> None:
    arguments = command(deep, tmp_path / "out", "--gpus", "2", "--device", "cpu")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as parent:
        journal = tmp_path / ".out.unfinished/journal.jsonl"
        deadline = time.monotonic() + 240
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
            assert parent.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        workers = [child for child in psutil.Process(parent.pid).children() if "lowbit" in child.cmdline()]
        victim = next(child for child in workers if child.environ()["RANK"] == "1")
        os.kill(victim.pid, signal.SIGKILL)
        said = parent.communicate(timeout=120)[1]
    assert parent.returncode == 1
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert "Traceback" not in said
    assert said.count("error:") == said.count("error: process 1 was ended by SIGKILL") == 1, said
    done = journal.read_bytes().count(b"\n") - 1
    again = run([*arguments, "--json"])
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["run"]["resumed_blocks"] == done >= 2
    assert (tmp_path / "out/model.safetensors").read_bytes() == (shared / "model.safetensors").read_bytes()


def test_an_error_is_told_once(deep: Path, shared: Path) -> None:
    taken = run(command(deep, shared, "--gpus", "2", "--device", "cpu"))
    assert taken.returncode == 1
    assert [line for line in taken.stderr.splitlines() if "error" in line] == [f"error: {shared} exists already"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--effort", "best"], "learned (--effort best, --tune, autoround) by one process only"),
        (["--method", "autoround"], "by one process only"),
        (["--method", "q4_k_m"], "GGUF files are made by one process only"),
        (["--num-samples", "1"], "1 calibration windows cannot be shared by 2 processes"),
        (["--fallback"], "--fallback"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_processes_are_started(
    lowbit_here: Run, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    monkeypatch.setattr("lowbit.api.launch.launch", lambda *_: pytest.fail("processes were started"))
    given = [flag for flag in FLAGS if flag != "--no-verify"]
    refused = lowbit_here(
        "quantize", tiny_llama, "-o", tmp_path / "out", *given, "--gpus", 2, "--device", "cpu", *flags
    )
    assert refused.returncode == 2
    assert refused.stderr.count("error:") == 1
    assert said in refused.stderr
    assert not (tmp_path / "out").exists()


def test_windows_are_at_least_as_many_as_processes() -> None:
    check_windows(2, 2)
    with pytest.raises(RecipeError, match="1 calibration windows cannot be shared by 2 processes"):
        check_windows(1, 2)


def test_more_gpus_than_there_are() -> None:
    from lowbit.api.launch import check_gpus

    with pytest.raises(RecipeError, match="this machine has"):
        check_gpus(torch.cuda.device_count() + 1, "auto")


def test_shares_cover_everything_once_in_order() -> None:
    for count in (1, 5, 8, 13):
        for size in (1, 2, 3, 5):
            shares = [World(rank, size).share(count) for rank in range(size)]
            assert [i for share in shares for i in range(count)[share]] == list(range(count))


def test_shared_statistics_sample_the_same_tokens_as_one_process_does() -> None:
    inputs = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))

    def watched(part: torch.Tensor, before: int) -> InputStatistics:
        statistics = InputStatistics(8, CPU, sample_every=7, before=before)
        for piece in torch.split(part, 4):
            statistics.add(piece)
        statistics.finish(ALONE)
        return statistics

    whole, parts = watched(inputs, 0), [watched(inputs[:13], 0), watched(inputs[13:], 13)]
    joined: Any = torch.cat([part.sample for part in parts if part.sample is not None])
    assert torch.equal(joined, whole.sample)
