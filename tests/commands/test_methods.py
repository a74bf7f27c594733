"""The method table agrees with what the presets, formats and planner really do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.commands.methods import method_table
from lowbit.core.errors import CheckpointError
from lowbit.formats import get_format
from lowbit.methods import METHODS
from lowbit.pipeline.plan import needs_input_scale, part_options
from lowbit.pipeline.schemes import Numbers, scheme_of
from lowbit.recipe import preset, preset_names


@pytest.mark.parametrize("name", sorted(method_table()))
def test_rows_say_what_the_preset_does(name: str) -> None:
    row, recipe = method_table()[name], preset(name)
    if recipe.method == "cast":
        assert row["formats"] == ["dense"]
        return
    method = METHODS.get(recipe.method)
    options = part_options(method, recipe.options)
    scheme = scheme_of(Numbers.of(recipe, None), method, reordered=False)
    assert recipe.format in row["formats"]
    for format in row["formats"]:
        assert get_format(format).refuse(scheme) is None
    calibrates = bool(recipe.transforms) or method.needs(options).calibration or needs_input_scale(scheme)
    assert row["calibration"] == calibrates
    assert (row["complexity"] > 1) == calibrates


def test_every_integer_and_float_preset_has_a_row() -> None:
    stored = {name for name in preset_names() if preset(name).format != "gguf"}
    assert stored - {"fp16"} <= set(method_table())


def test_measured_numbers_replace_general_ones(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    recipe = preset("awq").model_dump(mode="json")
    verification = {"perplexity": 11.0, "base_perplexity": 10.0, "kl": 0.07, "top1": 0.9}
    record = {"recipe": recipe, "bits_per_weight": 4.25, "bytes": 1000, "verification": verification}
    (folder / "lowbit.json").write_text(json.dumps(record))
    result = CliRunner().invoke(app, ["methods", "--json", "--measured", str(tmp_path / "runs")])
    assert result.exit_code == 0
    table = json.loads(result.stdout)
    assert table["awq"]["loss"] == "10.00"
    assert (table["awq"]["bits"], table["awq"]["kl"], table["awq"]["measured"]) == (4.25, 0.07, True)
    assert table["rtn"]["measured"] is False
    assert "hardware" in table["awq"]


def test_a_folder_without_artifacts_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["methods", "--measured", str(tmp_path)])
    assert isinstance(result.exception, CheckpointError)


def test_the_table_is_printed() -> None:
    result = CliRunner().invoke(app, ["methods"])
    assert result.exit_code == 0
    assert "awq" in result.stdout
    assert "SmoothQuant, then INT8 weights and activations" in result.stdout  # nothing is cut
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
