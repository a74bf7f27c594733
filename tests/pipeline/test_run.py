"""The streaming pipeline end to end on tiny models: artifacts, resuming, killing, refusing."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit
from lowbit.api.run import Settings
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.errors import CheckpointError, FormatError, OutputError, RecipeError, ResumeError, VerificationError
from lowbit.core.progress import Silent
from lowbit.formats.reader import ArtifactCheckpoint
from lowbit.pipeline.writer import ShardedWriter, output_errors, save_tensors

RECIPE: dict[str, Any] = {
    "method": "gptq",
    "bits": 4,
    "group_size": 32,
    "dataset": "pydoc",
    "num_samples": 8,
    "seq_len": 64,
}


def weight_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def deep_llama(make_model: Callable[..., Path]) -> Path:
    return make_model(num_hidden_layers=12)


@pytest.fixture(scope="module")
def undisturbed(deep_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "artifact"
    lowbit.quantize(deep_llama, output=output, **RECIPE)
    return output


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_artifact_holds_what_was_measured(tiny_llama: Path, tmp_path: Path, format: str) -> None:
    result = lowbit.quantize(tiny_llama, output=tmp_path / "out", format=format, **RECIPE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    artifact = open_checkpoint(tmp_path / "out")
    stored = sum(spec.nbytes for spec in artifact.tensors.values())
    assert stored == result.record["bytes"]
    assert result.record["bits_per_weight"] == pytest.approx(4 + 16 / 32, abs=0.6)
    dense = ArtifactCheckpoint(artifact, torch.float32)
    assert len(dense.modules) == 21
    assert all(0 < layer["error"] < 0.2 for layer in result.record["layers"].values())
    assert 0 < result.record["verification"]["kl"] < 1
    assert "KL divergence" in (tmp_path / "out/README.md").read_text()
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_unmodified_transformers_answers_like_the_dequantized_weights(undisturbed: Path, deep_llama: Path) -> None:
    served = AutoModelForCausalLM.from_pretrained(undisturbed, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(deep_llama, dtype=torch.float32)
    artifact = ArtifactCheckpoint(open_checkpoint(undisturbed), torch.float32)
    dense.load_state_dict({name: artifact.read(name).float() for name in artifact.tensors}, strict=False)
    ids = torch.randint(1, 500, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = served(ids).logits, dense(ids).logits
    assert (theirs.argmax(-1) == ours.argmax(-1)).float().mean() > 0.98
    torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-2)


def test_our_divergence_equals_a_plain_computation(undisturbed: Path, deep_llama: Path) -> None:
    """Whole models by transformers, all logits at once, against the streamed and sliced measurement."""
    measured = lowbit.evaluate(undisturbed, base=deep_llama, windows=3, context=100)
    tokenizer = AutoTokenizer.from_pretrained(deep_llama)
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer(text).input_ids[:300]).view(3, 100)
    base = AutoModelForCausalLM.from_pretrained(deep_llama, dtype=torch.float32)
    artifact = ArtifactCheckpoint(open_checkpoint(undisturbed), torch.float32)
    with torch.no_grad():
        expected = base(ids).logits[:, :-1].log_softmax(-1)
        base.load_state_dict({name: artifact.read(name).float() for name in artifact.tensors}, strict=False)
        actual = base(ids).logits[:, :-1].log_softmax(-1)
    kl = (expected.exp() * (expected - actual)).sum(-1)
    assert measured.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert measured.kl_p99 == pytest.approx(kl.flatten().quantile(0.99).item(), rel=1e-3)
    nll = -actual.gather(-1, ids[:, 1:, None]).mean()
    assert measured.perplexity == pytest.approx(nll.exp().item(), rel=1e-4)
    assert measured.top1 == pytest.approx((expected.argmax(-1) == actual.argmax(-1)).float().mean().item())


def test_same_recipe_same_bytes(undisturbed: Path, deep_llama: Path, tmp_path: Path) -> None:
    lowbit.quantize(deep_llama, output=tmp_path / "again", **RECIPE)
    assert weight_bytes(tmp_path / "again") == weight_bytes(undisturbed)
    assert (tmp_path / "again/lowbit.json").read_text() == (undisturbed / "lowbit.json").read_text()


def _quantize_in_child(model: Path, output: Path) -> multiprocessing.process.BaseProcess:
    # a fork of this process, so that ten runs do not import torch ten times
    child = multiprocessing.get_context("fork").Process(
        target=lowbit.quantize, args=(model,), kwargs={"output": output, **RECIPE}
    )
    child.start()
    return child


def test_killed_ten_times_and_resumed_gives_the_same_bytes(undisturbed: Path, deep_llama: Path, tmp_path: Path) -> None:
    output, chance = tmp_path / "artifact", random.Random(0)
    journal = tmp_path / ".artifact.unfinished/journal.jsonl"
    kills = blocks = 0
    while kills < 10:
        child = _quantize_in_child(deep_llama, output)
        if kills % 2:  # every other time some way into a block, else anywhere from the first moment on
            deadline = time.monotonic() + 60
            while child.is_alive() and time.monotonic() < deadline and _lines(journal) <= blocks:
                time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.08))
        assert child.is_alive(), "the run ended before it could be killed"
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        kills += 1
        assert not output.exists()
        assert max(_lines(journal) - 1, 0) >= blocks - 1, "a finished block was forgotten"
        blocks = _lines(journal)
    result = lowbit.quantize(deep_llama, output=output, **RECIPE)
    assert result.run["resumed_blocks"] == blocks - 1 > 0
    assert weight_bytes(output) == weight_bytes(undisturbed)
    assert (output / "lowbit.json").read_text() == (undisturbed / "lowbit.json").read_text()


def _lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


class _Stop(Exception):
    pass


class _StopAfter(Silent):
    """Breaks a run off after some blocks."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def advance(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise _Stop


def test_changed_recipe_is_refused_by_name_and_restart_drops_the_rest(deep_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(_Stop):
        lowbit.quantize(deep_llama, output=tmp_path / "out", progress=_StopAfter(3), **RECIPE)
    with pytest.raises(ResumeError, match="recipe") as caught:
        lowbit.quantize(deep_llama, output=tmp_path / "out", **{**RECIPE, "bits": 8})
    assert "--restart" in str(caught.value.hint)
    result = lowbit.quantize(
        deep_llama, output=tmp_path / "out", settings=Settings(restart=True), **{**RECIPE, "bits": 8}
    )
    assert result.run["resumed_blocks"] == 0


def test_spilled_activations_change_nothing(undisturbed: Path, deep_llama: Path, tmp_path: Path) -> None:
    lowbit.quantize(deep_llama, output=tmp_path / "out", settings=Settings(max_memory=1000), **RECIPE)
    assert weight_bytes(tmp_path / "out") == weight_bytes(undisturbed)
    assert not list((tmp_path / "out").glob("activations*"))


@pytest.mark.parametrize("method", ["fp16", "bf16"])
def test_cast_changes_the_dtype_only(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    lowbit.quantize(tiny_llama, output=tmp_path / "out", method=method)
    dtype = torch.float16 if method == "fp16" else torch.bfloat16
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor.to(dtype)) for name, tensor in before.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "phi3", "gemma2", "qwen3"])
def test_other_families(model_type: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    from tests.core.test_streamed_model import EXTRA

    folder = make_model(model_type, **EXTRA.get(model_type, {}))
    result = lowbit.quantize(folder, output=tmp_path / "out", **RECIPE)
    assert result.record["verification"]["kl"] < 0.5
    if model_type != "gpt2":  # transformers' decompression of Conv1D layers is not supported by compressed-tensors
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert torch.isfinite(loaded(torch.arange(1, 9)[None]).logits).all()


def test_overrides_and_ignores(tiny_llama: Path, tmp_path: Path) -> None:
    from lowbit.recipe import Override

    result = lowbit.quantize(
        tiny_llama,
        output=tmp_path / "out",
        overrides=(Override(match="*.down_proj", bits=8).model_dump(),),
        ignore=("lm_head", "re:layers\\.0\\."),
        **RECIPE,
    )
    layers = result.record["layers"]
    assert not any(".layers.0." in path for path in layers)
    assert {layer["scheme"]["name"] for path, layer in layers.items() if "down_proj" in path} == {"w8a16"}
    artifact = ArtifactCheckpoint(open_checkpoint(tmp_path / "out"), torch.float32)
    down = artifact.scheme("model.layers.1.mlp.down_proj")
    assert down is not None
    assert down.bits == 8
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.isfinite(loaded(torch.arange(1, 9)[None]).logits).all()


def broken_copy(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def test_nan_weights_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")

    model = broken_copy(tiny_llama, tmp_path / "nan", poison)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN"):
        lowbit.quantize(model, output=tmp_path / "out", **RECIPE)
    assert not (tmp_path / "out").exists()


def test_garbage_is_an_error_not_a_file(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="worst layers|does not speak") as caught:
        lowbit.quantize(tiny_llama, output=tmp_path / "out", settings=Settings(max_kl=1e-9), **RECIPE)
    assert "model.layers." in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"group_size": 48}, RecipeError, "does not divide the 64 inputs"),
        ({"method": "gtpq"}, RecipeError, "did you mean 'gptq'"),
        ({"format": "gtpq"}, FormatError, "did you mean 'gptq'"),
        ({"options": {"percdam": 1}}, RecipeError, "did you mean 'percdamp'"),
        ({"seq_len": 5000}, RecipeError, "longer than the 256 positions"),
        ({"ignore": ("*",)}, RecipeError, "every linear layer is ignored"),
        ({"symmetric": False, "format": "gptq"}, FormatError, "zero point"),
    ],
)
def test_wishes_that_cannot_be_are_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        lowbit.quantize(tiny_llama, output=tmp_path / "out", **{**RECIPE, **changes})
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_says_how_much_there_is(tiny_llama: Path, tmp_path: Path) -> None:
    from lowbit.core.errors import CalibrationError

    (tmp_path / "short.txt").write_text("a few words " * 100)
    recipe = {**RECIPE, "dataset": str(tmp_path / "short.txt"), "num_samples": 400}
    with pytest.raises(CalibrationError, match=r"holds \d+ tokens, which is \d+ windows of 64; 400 were asked for"):
        lowbit.quantize(tiny_llama, output=tmp_path / "out", **recipe)


def test_taken_and_unwritable_output(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("keep me")
    with pytest.raises(OutputError, match="exists already"):
        lowbit.quantize(tiny_llama, output=tmp_path / "out", **RECIPE)
    assert (tmp_path / "out/precious").read_text() == "keep me"
    with pytest.raises(OutputError, match="cannot be written"):
        lowbit.quantize(tiny_llama, output="/proc/nowhere/out", **RECIPE)


def test_full_disk_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is full") as caught, output_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "resumes" in str(caught.value.hint)


def test_training_state_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    """A real refusal by the system, at 64 KiB a file: safetensors has an error of its own for it."""
    import resource

    file = tmp_path / "state.safetensors"
    save_tensors(file, {"values": torch.ones(8)}, {"step": "1"})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written: File too large"):
            save_tensors(file, {"values": torch.zeros(2**18)}, {"step": "2"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    with safe_open(file, "pt") as stored:
        assert stored.metadata() == {"step": "1"}
        assert torch.equal(stored.get_tensor("values"), torch.ones(8))


def test_more_than_the_disk_holds_is_refused_at_the_start(tmp_path: Path) -> None:
    from lowbit.core.contracts import TensorSpec

    huge = shutil.disk_usage(tmp_path).free + 2**40
    with pytest.raises(OutputError, match="is full"):
        ShardedWriter(tmp_path / "out", {"a": TensorSpec(torch.uint8, (huge,))})
    assert list((tmp_path / "out").iterdir()) == []


def test_shards_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.core.contracts import TensorSpec
    from lowbit.pipeline import writer

    monkeypatch.setattr(writer, "MAX_SHARD", 300)
    tensors = {f"t{i}": torch.randn(8, 8).half() for i in range(5)} | {"odd": torch.arange(7, dtype=torch.int32)}
    layout = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    sharded = ShardedWriter(tmp_path, layout)
    for name in reversed(tensors):
        sharded.write(name, tensors[name])
    checksums = sharded.finish()
    assert len(checksums) == len(list(tmp_path.glob("model-*.safetensors"))) == 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in layout.values())


def test_self_sampled_calibration(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = {**RECIPE, "dataset": "self", "num_samples": 4, "seq_len": 16}
    first = lowbit.quantize(tiny_llama, output=tmp_path / "a", **recipe)
    again = lowbit.quantize(tiny_llama, output=tmp_path / "b", **recipe)
    other = lowbit.quantize(tiny_llama, output=tmp_path / "c", **{**recipe, "seed": 1})
    assert first.record["calibration"] == again.record["calibration"] != other.record["calibration"]


def test_resumes_only_with_whole_lines(tmp_path: Path) -> None:
    from lowbit.pipeline.journal import Journal

    journal = Journal(tmp_path, {"recipe": 1})
    journal.done(0, {"errors": {}, "notes": {}})
    with (tmp_path / "journal.jsonl").open("a") as stream:
        stream.write('{"block": 1, "err')
    again = Journal(tmp_path, {"recipe": 1})
    assert list(again.blocks) == [0]
    again.done(1, {"errors": {}, "notes": {}})
    assert list(Journal(tmp_path, {"recipe": 1}).blocks) == [0, 1]
