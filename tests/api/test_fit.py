"""lowbit fit on a tiny model: the recipe's file has the size and types that were promised."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from typer.testing import CliRunner

import lowbit
from lowbit.api.fit import fit
from lowbit.api.run import Settings
from lowbit.cli import app
from lowbit.core.errors import RecipeError
from lowbit.recipe import Calibration, Recipe
from tests.gguf_files import write_gguf

TEXT = Calibration(dataset="pydoc", num_samples=4, seq_len=64)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(
    request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = make_model(hidden_size=256, intermediate_size=512, num_hidden_layers=2, tie_word_embeddings=request.param)
    return write_gguf(folder, tmp_path_factory.mktemp("fit") / "tiny-f16.gguf")


def test_recipe_gives_the_promised_file(source: Path, tmp_path: Path) -> None:
    found = fit(source, like="q4_k_m", calibration=TEXT)
    size, divergence = found.like["q4_k_m"]
    assert found.nbytes <= size
    assert found.bound <= found.kl <= divergence
    made = lowbit.quantize(
        source, output=tmp_path / "m.gguf", recipe=found.recipe, settings=Settings(verify=False), options={"sweeps": 1}
    )
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(made.path).tensors}
    assert {name: types[name] for name in found.types} == found.types
    assert made.path.stat().st_size == pytest.approx(found.nbytes, rel=0.01)


def test_too_small_a_budget_says_what_would_do(source: Path) -> None:
    with pytest.raises(RecipeError, match="smallest numbers"):
        fit(source, size=10_000, calibration=TEXT)


def test_command_prints_json(source: Path, tmp_path: Path) -> None:
    flags = [
        "--like",
        "q3_k_s",
        "--num-samples",
        "4",
        "--seq-len",
        "64",
        "--effort",
        "best",
        "--recipe",
        str(tmp_path / "r.yaml"),
        "--json",
    ]
    done = CliRunner().invoke(app, ["fit", str(source), *flags])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["bytes"] <= said["like"]["q3_k_s"]["bytes"]
    written = Recipe.load(tmp_path / "r.yaml")
    assert written.method == "q4_k_m"
    assert written.options["tensor_type"]
    assert written.tune.steps > 0
    assert written.options["learn_steps"] > 0


def test_an_unknown_effort_is_refused_before_any_work(source: Path) -> None:
    done = CliRunner().invoke(app, ["fit", str(source), "--like", "q3_k_s", "--effort", "better"])
    assert done.exit_code != 0
    assert isinstance(done.exception, RecipeError)
