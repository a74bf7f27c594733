"""Predicted sizes beside those of files that were really written: every scheme in every format, every GGUF type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.api.gguf_options import gguf_recipe
from lowbit.api.memory import Model, artifact_bytes
from lowbit.api.quantize import quantize
from lowbit.api.run import Settings
from lowbit.core.errors import ArchitectureError, CheckpointError
from lowbit.core.ggml_types import FILE_TYPES
from tests.pipeline.test_matrix import CASES, SCHEMES, recipe_of

GGUF = [name.lower() for name in FILE_TYPES]


@pytest.fixture(scope="module")
def block(make_model: Callable[..., Path]) -> Path:
    return make_model(num_hidden_layers=1)


@pytest.mark.parametrize(("name", "fmt"), [*CASES, ("bf16", "dense")])
def test_a_directory_has_the_predicted_size(block: Path, tmp_path: Path, name: str, fmt: str) -> None:
    from lowbit.recipe import preset

    if name in SCHEMES and SCHEMES[name][0] in ("nf4", "fp4", "llm_int8"):
        pytest.importorskip("bitsandbytes")
    recipe = preset("bf16") if name == "bf16" else recipe_of(name, fmt)
    made = quantize(block, output=tmp_path / "out", recipe=recipe, settings=Settings(verify=False))
    assert artifact_bytes(block, recipe) == sum(file.stat().st_size for file in made.path.glob("*.safetensors"))
    assert Model(made.path).weights == made.record["bytes"] == Model(block).size(recipe).weights


@pytest.mark.parametrize("method", GGUF)
def test_a_gguf_file_has_the_predicted_size(wide_llama: Path, wide_gguf: Path, tmp_path: Path, method: str) -> None:
    recipe = gguf_recipe(method)
    made = quantize(wide_gguf, output=tmp_path / "out.gguf", recipe=recipe, settings=Settings(verify=False))
    real = made.path.stat().st_size
    assert artifact_bytes(wide_llama, recipe) == pytest.approx(real, rel=0.01)
    assert artifact_bytes(wide_gguf, recipe) == pytest.approx(real, rel=0.01)
    # of the tensors alone the prediction is exact
    assert Model(wide_llama).size(recipe).weights == Model(made.path).weights


def test_a_configuration_alone_gives_the_same_sizes(wide_llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((wide_llama / name).read_bytes())
    for method in ("gptq", "fp8", "nf4", "q4_k_m", "q3_k_s"):
        expected = artifact_bytes(wide_llama, method)
        assert artifact_bytes(tmp_path, method) == artifact_bytes(tmp_path / "config.json", method) == expected


def test_known_files_of_known_models(tmp_path: Path) -> None:
    """Sizes of published files: TheBloke/Llama-2-7B-GGUF (4.08 GB, 2.95 GB), TheBloke/Llama-2-7B-AWQ (3.89 GB),
    meta-llama/Llama-2-7b-hf (13.48 GB)."""
    config = '{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, ' \
        '"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": false, ' \
        '"dtype": "float16"}'  # fmt: skip
    (tmp_path / "config.json").write_text(config)
    known = {"fp16": 13.48e9, "awq": 3.89e9, "q4_k_m": 4.08e9, "q3_k_s": 2.95e9}
    for method, size in known.items():
        assert artifact_bytes(tmp_path, method) == pytest.approx(size, rel=0.01), method


def test_what_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense", "hidden_size": 8}')
    with pytest.raises(ArchitectureError, match="cannot build"):
        Model(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Model("/nowhere/model")
