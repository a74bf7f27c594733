from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lowbit.api.compare import compared
from lowbit.core.errors import CheckpointError, EvaluationError
from lowbit.report import compare_table
from tests.report.runs import write_artifact


@pytest.fixture
def artifacts(tmp_path: Path) -> list[Path]:
    return [
        write_artifact(tmp_path / "rtn", "rtn", 110, 0.3, 0.30, 12.0, "significant loss"),
        write_artifact(tmp_path / "gptq", "gptq", 110, 0.03, 0.44, 11.0),
        write_artifact(tmp_path / "int8", "rtn8", 200, 0.001, 0.43, 9.0),
        write_artifact(tmp_path / "awq", "awq", 115, 0.05, 0.43, None, "small loss"),
    ]


def test_rows_are_sorted_and_fronts_are_marked(artifacts: list[Path]) -> None:
    rows = compared(artifacts)
    assert [Path(str(values["name"])).name for values in rows] == ["base", "int8", "gptq", "awq", "rtn"]
    assert [values["pareto_memory"] for values in rows] == [True, False, True, False, False]
    assert [values["pareto_speed"] for values in rows] == [None, False, True, None, True]
    base = rows[0]
    assert (base["perplexity"], base["mib"], base["tasks"]["hellaswag"]["score"]) == (15.0, 400.0, 0.45)


def test_eighty_columns(artifacts: list[Path]) -> None:
    stream = io.StringIO()
    Console(file=stream, width=80).print(compare_table.rich_table(compared(artifacts), title="t"))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "44.0±5.0=" in text
    assert "30.0±5.0▼" in text
    assert "…" not in text
    assert "gptq 4-bit g64" in " ".join(text.split())


def test_the_legend_is_of_the_marks_that_are_there(artifacts: list[Path]) -> None:
    rows = compared(artifacts)
    assert [mark in compare_table.legend(rows) for mark in "=▾▼✗▴◆◇"] == [True] * 7
    without = [{**values, "tasks": {}, "pareto_speed": None} for values in rows]
    assert compare_table.legend(without) == "◆ nothing smaller is as good"
    assert compare_table.legend([{**values, "pareto_memory": None} for values in without]) == ""


def test_markdown_and_csv_hold_every_row(artifacts: list[Path]) -> None:
    rows = compared(artifacts)
    lines = compare_table.as_markdown(rows).splitlines()
    assert len(lines) == 7
    assert len({line.count("|") for line in lines}) == 1
    assert "| significant loss |" in lines[-1]
    table = list(csv.DictReader(io.StringIO(compare_table.as_csv(rows))))
    assert [row["hellaswag_verdict"] for row in table][1:] == ["indistinguishable"] * 2 + [
        "small loss",
        "significant loss",
    ]
    assert float(table[2]["hellaswag_low"]) == pytest.approx(-0.06)


def test_equal_methods_are_told_apart(tmp_path: Path) -> None:
    both = [write_artifact(tmp_path / name, "gptq", 100, kl, 0.4, 9.0) for name, kl in (("a", 0.1), ("b", 0.2))]
    assert [values["method"] for values in compared(both)][1:] == ["gptq 4-bit g64 (a)", "gptq 4-bit g64 (b)"]


def test_run_files_and_what_is_neither(artifacts: list[Path], tmp_path: Path) -> None:
    assert compared([artifacts[0] / "lowbit-eval.json"])[1]["kl"] == 0.3
    with pytest.raises(CheckpointError, match="no lowbit artifact"):
        compared([tmp_path])
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(EvaluationError, match="cannot be read"):
        compared([tmp_path / "x.json"])
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(EvaluationError, match="no run"):
        compared([tmp_path / "x.json"])
