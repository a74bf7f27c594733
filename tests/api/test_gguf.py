"""From a checkpoint to a file that the real llama.cpp loads."""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import lowbit
from lowbit.api.run import Settings
from lowbit.core.errors import CheckpointError, FormatError, OutputError, RecipeError, ResumeError
from lowbit.methods.kquants import encode
from lowbit.pipeline.gguf_writer import GgufWriter
from tests.gguf_files import gguf_tensors
from tests.interrupted import StopAt

QUICK: dict[str, Any] = {"dataset": "pydoc", "num_samples": 4, "seq_len": 64, "options": {"sweeps": 1}}


def quantized(source: Path, output: Path, method: str, **changes: Any) -> Any:
    settings = changes.pop("settings", Settings(verify=False))
    return lowbit.quantize(source, output=output, method=method, settings=settings, **changes)


def test_tensors_are_encoded_and_typed_as_llama_quantize_does(
    wide_llama: Path, wide_gguf: Path, tmp_path: Path
) -> None:
    quantized(wide_gguf, tmp_path / "m.gguf", "q4_k_m")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    dense = gguf_tensors(wide_llama)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    # 2 blocks: n/8 is 0 and 7n/8 is 1, so that only the second gets more bits for v and down
    assert types["blk.0.attn_v.weight"] == types["blk.0.ffn_down.weight"] == types["blk.0.attn_q.weight"] == "Q4_K"
    assert types["blk.1.attn_v.weight"] == types["blk.1.ffn_down.weight"] == types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == "Q4_K"
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert set(types) == set(dense)
    for tensor in reader.tensors:
        weight = torch.from_numpy(dense[tensor.name]).float()
        expected = weight if weight.dim() == 1 else encode(types[tensor.name], weight)
        assert tensor.data.tobytes() == expected.numpy().tobytes(), tensor.name


def test_metadata_is_copied_and_says_where_the_file_comes_from(wide_gguf: Path, tmp_path: Path) -> None:
    quantized(wide_gguf, tmp_path / "m.gguf", "q3_k_s")
    before, after = gguf.GGUFReader(wide_gguf).fields, gguf.GGUFReader(tmp_path / "m.gguf").fields
    for key in set(before) - {"general.file_type", "GGUF.kv_count", "GGUF.tensor_count"}:
        assert before[key].contents() == after[key].contents(), key
    assert after["general.file_type"].contents() == 11
    assert after["general.lowbit.base"].contents() == "tiny-f16.gguf"
    record = json.loads((tmp_path / "m.lowbit.json").read_text())
    assert record["layers"]["blk.0.ffn_up.weight"]["scheme"]["name"] == "Q3_K"
    assert "FROM ./m.gguf" in (tmp_path / "m.Modelfile").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.Modelfile", "m.card.md", "m.gguf", "m.lowbit.json"]


def test_second_order_is_verified_and_better_than_plain(wide_gguf: Path, tmp_path: Path) -> None:
    settings = Settings(verify=True, max_kl=50.0)
    plain = quantized(wide_gguf, tmp_path / "plain.gguf", "q3_k_s", settings=settings)
    better = quantized(wide_gguf, tmp_path / "better.gguf", "q3_k_s", settings=settings, **QUICK | {"num_samples": 96})
    assert better.measurement["kl"] < plain.measurement["kl"]
    assert (tmp_path / "plain.gguf").stat().st_size < (tmp_path / "better.gguf").stat().st_size + 4096
    types = [
        {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("plain", "better")
    ]
    assert types[0] == types[1]
    assert better.record["layers"]["blk.0.attn_q.weight"]["error"] < 0.1
    fields = gguf.GGUFReader(tmp_path / "better.gguf").fields
    assert fields["quantize.imatrix.entries_count"].contents() == 14
    assert fields["quantize.imatrix.chunks_count"].contents() == 96


@pytest.mark.parametrize(("stage", "steps", "changes"), [
    ("quantize", 1, QUICK),
    ("quantize", 0, QUICK),
    ("encode", 5, {}),
    ("encode", 3, QUICK | {"options": {"refine": "imatrix"}}),
])  # fmt: skip
def test_a_run_that_was_cut_off_gives_the_same_bytes(
    wide_gguf: Path, tmp_path: Path, stage: str, steps: int, changes: dict[str, Any]
) -> None:
    quantized(wide_gguf, tmp_path / "a" / "m.gguf", "q4_k_m", **changes)
    with pytest.raises(KeyboardInterrupt):
        quantized(wide_gguf, tmp_path / "b" / "m.gguf", "q4_k_m", progress=StopAt(stage, steps), **changes)
    assert not (tmp_path / "b" / "m.gguf").exists()
    quantized(wide_gguf, tmp_path / "b" / "m.gguf", "q4_k_m", **changes)
    assert (tmp_path / "a" / "m.gguf").read_bytes() == (tmp_path / "b" / "m.gguf").read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in (tmp_path / "b").iterdir())


def test_an_unfinished_run_with_other_settings_is_not_continued(wide_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantized(wide_gguf, tmp_path / "m.gguf", "q4_k_m", progress=StopAt("encode", 2))
    with pytest.raises(ResumeError):
        quantized(wide_gguf, tmp_path / "m.gguf", "q3_k_s")
    quantized(wide_gguf, tmp_path / "m.gguf", "q3_k_s", settings=Settings(verify=False, restart=True))


def test_split_files_hold_every_tensor_once(wide_gguf: Path, tmp_path: Path) -> None:
    whole = quantized(wide_gguf, tmp_path / "whole.gguf", "q8_0")
    result = quantized(wide_gguf, tmp_path / "m.gguf", "q8_0", options={"max_shard_size": 400_000})
    parts = sorted(tmp_path.glob("m-*-of-*.gguf"))
    assert len(parts) > 2
    assert result.path == parts[0] == tmp_path / f"m-00001-of-{len(parts):05}.gguf"
    data = {}
    for number, part in enumerate(parts):
        reader = gguf.GGUFReader(part)
        assert reader.fields["split.no"].contents() == number
        assert reader.fields["split.count"].contents() == len(parts)
        for tensor in reader.tensors:
            assert tensor.name not in data
            data[tensor.name] = tensor.data.tobytes()
    assert data == {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(whole.path).tensors}


def test_what_was_quantized_is_quantized_again_only_when_allowed(wide_gguf: Path, tmp_path: Path) -> None:
    first = quantized(wide_gguf, tmp_path / "first.gguf", "q8_0")
    with pytest.raises(CheckpointError, match="quantized already"):
        quantized(first.path, tmp_path / "second.gguf", "q4_0")
    quantized(first.path, tmp_path / "second.gguf", "q4_0", options={"allow_requantize": True})
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "second.gguf").tensors}
    assert kinds["blk.1.ffn_up.weight"] == "Q4_0"


def test_options_that_change_types(wide_gguf: Path, tmp_path: Path) -> None:
    options = {"pure": True, "output_tensor_type": "q8_0", "tensor_type": ["attn_v=q5_k"]}
    quantized(wide_gguf, tmp_path / "m.gguf", "q4_k_m", options=options)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["output.weight"] == "Q8_0"
    assert kinds["blk.1.attn_v.weight"] == "Q5_K"
    assert kinds["blk.1.ffn_down.weight"] == kinds["token_embd.weight"] == "Q4_K"


@pytest.mark.parametrize(("changes", "error", "what"), [
    ({"options": {"refine": "hessian"}}, RecipeError, "calibration text"),
    ({**QUICK, "options": {"refine": "best"}}, RecipeError, "unknown"),
    ({"options": {"pur": True}}, RecipeError, "did you mean 'pure'"),
    ({"options": {"imatrix": "/nowhere"}}, RecipeError, "does not exist"),
    ({"options": {"tensor_type": ["attn_v"]}}, FormatError, "PATTERN=TYPE"),
])  # fmt: skip
def test_wrong_options(wide_gguf: Path, tmp_path: Path, changes: dict[str, Any], error: type, what: str) -> None:
    with pytest.raises(error, match=what):
        quantized(wide_gguf, tmp_path / "m.gguf", "q4_k_m", **changes)
    assert not (tmp_path / "m.gguf").exists()


def test_a_disk_that_fills_up_is_an_error_and_the_run_continues(
    wide_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are written behind the encoder's back; what it is told of late must not count as done."""
    usual, written = GgufWriter.write, []

    def write(self: GgufWriter, name: str, data: torch.Tensor) -> None:
        if len(written) == 5:
            raise OutputError("the disk is full")
        written.append(name)
        usual(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(GgufWriter, "write", write)
        with pytest.raises(OutputError, match="full"):
            quantized(wide_gguf, tmp_path / "m.gguf", "q4_k_m")
    assert not (tmp_path / "m.gguf").exists()
    quantized(wide_gguf, tmp_path / "m.gguf", "q4_k_m")
    whole = quantized(wide_gguf, tmp_path / "whole.gguf", "q4_k_m").path
    tensors = [{t.name: t.data.tobytes() for t in gguf.GGUFReader(f).tensors} for f in (tmp_path / "m.gguf", whole)]
    assert tensors[0] == tensors[1]


def test_an_output_that_exists_is_left_alone(wide_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(OutputError):
        quantized(wide_gguf, tmp_path / "m.gguf", "q4_k_m")
    assert (tmp_path / "m.gguf").read_text() == "mine"


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")
@pytest.mark.parametrize("method", ["q4_k_m", "q3_k_s"])
def test_llama_cpp_loads_it_and_says_what_the_dequantized_weights_say(
    wide_llama: Path, wide_gguf: Path, tmp_path: Path, method: str
) -> None:
    import xllamacpp
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lowbit.core.checkpoint.gguf import GgufCheckpoint

    quantized(wide_gguf, tmp_path / "m.gguf", method, **QUICK)
    tokenizer = AutoTokenizer.from_pretrained(wide_llama)
    model = AutoModelForCausalLM.from_pretrained(wide_llama, dtype=torch.float32)
    checkpoint = GgufCheckpoint(
        tmp_path / "m.gguf", json.loads((wide_llama / "config.json").read_text()), torch.float32
    )
    model.load_state_dict({name: checkpoint.read(name) for name in checkpoint.tensors})
    prompt = "The import statement"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids).logits[0, -1].softmax(-1)

    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "m.gguf")
    params.n_ctx, params.cpuparams.n_threads, params.warmup = 128, 1, False
    server = xllamacpp.Server(params)
    question = json.dumps(
        {"prompt": ids[0].tolist(), "n_predict": 1, "n_probs": 5, "logit_bias": [["a", 1e6]]}
    ).encode()
    with urllib.request.urlopen(f"{server.listening_address}/completion", question) as answer:
        top = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
    assert len(top) == 5
    for entry in top:
        # llama.cpp rounds activations to 8 bits
        assert torch.tensor(entry["logprob"]).exp().item() == pytest.approx(
            expected[entry["id"]].item(), rel=0.25, abs=0.01
        )


def test_a_shown_recipe_has_all_options_and_means_the_same(wide_gguf: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lowbit.api.gguf_options import GgufOptions, gguf_options, gguf_recipe
    from lowbit.cli import app
    from lowbit.recipe import Recipe

    shown = CliRunner().invoke(app, ["recipe", "show", "q4_k_m"])
    assert "learn_steps: 0" in shown.stdout
    (tmp_path / "recipe.yaml").write_text(shown.stdout)
    read = Recipe.load(tmp_path / "recipe.yaml")
    assert gguf_options(read) == gguf_options(gguf_recipe("q4_k_m")) == GgufOptions(refine="none")
    assert gguf_options(read.updated(dataset="pydoc")).refine == "hessian"


def test_dry_run_tells_types_and_size_before_any_conversion(wide_llama: Path, wide_gguf: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lowbit.cli import app

    done = CliRunner().invoke(app, ["quantize", str(wide_llama), "--method", "q4_k_m", "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    planned = json.loads(done.stdout)
    made = quantized(wide_gguf, tmp_path / "m.gguf", "q4_k_m").path
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(made).tensors}
    assert {name: tensor["type"] for name, tensor in planned["tensors"].items()} == types
    assert planned["bytes"] == pytest.approx(made.stat().st_size, rel=0.01)
