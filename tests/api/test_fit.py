"""lowbit fit on a tiny model: the recipe's file has the size and types that were promised."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from typer.testing import CliRunner

import lowbit
from lowbit.api.effort import with_effort
from lowbit.api.fit import fit
from lowbit.api.gguf_options import gguf_options
from lowbit.api.quantize import recipe_for
from lowbit.api.run import Settings
from lowbit.cli import app
from lowbit.core.errors import RecipeError
from lowbit.core.progress import Progress, Silent
from lowbit.recipe import Calibration, Recipe
from tests.gguf_files import write_gguf
from tests.interrupted import StopAt

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


class Stages(Silent):
    """Notes which stages a run has."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def start(self, what: str, total: int) -> None:
        self.stages.append(what)


def types_of(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def fitting(source: Path, output: Path, progress: Progress | None = None) -> Path:
    """A file whose types quantizing chose itself, on the text that `fit` reads."""
    return lowbit.quantize(
        source, output=output, method="q3_k_m", dataset="pydoc", num_samples=4, seq_len=64, progress=progress,
        options={"fit_types": True, "sweeps": 1}, settings=Settings(device="cpu", verify=False),
    ).path  # fmt: skip


def test_quantizing_fits_types_as_fit_does(source: Path, tmp_path: Path) -> None:
    types = types_of(fitting(source, tmp_path / "m.gguf"))
    found = fit(source, like="q3_k_m", calibration=TEXT, device="cpu")
    assert {name: types[name] for name in found.types} == found.types
    plain = lowbit.quantize(
        source, output=tmp_path / "plain.gguf", method="q3_k_m", settings=Settings(device="cpu", verify=False)
    )
    assert types_of(plain.path) != types
    assert (tmp_path / "m.gguf").stat().st_size <= plain.path.stat().st_size + 1024  # more metadata: of the text


def test_a_continued_run_keeps_the_types(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fitting(source, tmp_path / "m.gguf", StopAt("quantize", 1))
    seen = Stages()
    again = fitting(source, tmp_path / "m.gguf", seen)
    assert "price" not in seen.stages
    assert again.read_bytes() == fitting(source, tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_type": ["ffn=q6_k"]}, "fitted and named"),
        ({"pure": True}, "fitted and named"),
        ({"refine": "none"}, "refine"),
    ],
)
def test_what_fitting_cannot_go_with_is_refused(options: dict[str, object], said: str, source: Path) -> None:
    recipe = recipe_for("q4_k_m").updated(dataset="pydoc", options={"fit_types": True, **options})
    with pytest.raises(RecipeError, match=said):
        gguf_options(recipe)


@pytest.mark.parametrize(
    ("method", "options", "fitted"),
    [
        ("q4_k_m", {}, True),
        ("q3_k_s", {}, True),
        ("q4_k_m", {"fit_types": False}, False),
        ("q4_k_m", {"tensor_type": ["ffn_down=q6_k"]}, False),
        ("q4_0", {}, False),
        ("iq4_nl", {}, False),
    ],
)
def test_best_effort_fits_the_types_of_mixtures(method: str, options: dict[str, object], fitted: bool) -> None:
    assert with_effort(recipe_for(method).updated(options=options or None), "best").options["fit_types"] is fitted


def test_the_command_takes_the_flag(source: Path) -> None:
    flags = ["--method", "q4_k_m", "--dataset", "pydoc", "--effort", "best", "--dry-run"]
    assert "types are fitted" in CliRunner().invoke(app, ["quantize", str(source), *flags]).stdout
    assert "types are fitted" not in CliRunner().invoke(app, ["quantize", str(source), *flags, "--no-fit-types"]).stdout
