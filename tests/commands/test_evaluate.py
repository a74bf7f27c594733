"""evaluate, compare, report and quantize's limits as a user meets them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from tests.in_process import Run
from tests.report.runs import write_artifact
from tests.task_data import write_task_data


def test_tasks_from_files_then_compare_and_report(lowbit_here: Run, tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data = write_task_data(tmp_path)
    done = lowbit_here("evaluate", tiny_llama, "--base", tiny_llama, "--tasks", "hellaswag:4,kl", "--data", data,
                       "--windows", "2", "--context", "32", "-o", tmp_path / "run.json", cache=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hellaswag" in done.stdout
    assert "indistinguishable" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith(" ")) <= 80  # the table's
    assert "weights " in done.stdout
    table = lowbit_here("compare", tmp_path / "run.json", "--csv")
    assert list(csv.DictReader(io.StringIO(table.stdout)))[-1]["hellaswag_n"] == "4"
    page = lowbit_here("report", tmp_path / "run.json", "-o", tmp_path / "report.html")
    assert page.stdout.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10**6


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--tasks", "helaswag"], 2, "did you mean 'hellaswag'"),
        (["--tasks", "hellaswag", "--data", "/nowhere"], 1, "no folder of task data"),
        (["--tasks", "kl", "--runtime", "http://127.0.0.1:9"], 1, "does not answer"),
        (["--runtime", "llamacpp"], 2, "did you mean 'llama.cpp'"),
    ],
)
def test_errors(lowbit_here: Run, arguments: list[str], code: int, said: str, tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    done = lowbit_here("evaluate", tiny_llama, "--base", tiny_llama, *arguments, cache=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr.strip().splitlines()[-2]
    assert done.stderr.strip().splitlines()[-1].startswith("hint: ")
    assert "Traceback" not in done.stderr


def test_not_good_enough_is_exit_code_3(lowbit_here: Run, tiny_llama: Path, tmp_path: Path) -> None:
    # 8 bits: so good that nothing but the limit can fail
    asked = [
        "quantize",
        tiny_llama,
        "--method",
        "rtn",
        "--bits",
        "8",
        "--group-size",
        "64",
        "-o",
        tmp_path / "out",
        "-q",
    ]
    done = lowbit_here(*asked, "--min-recovery", "200")
    assert done.returncode == 3, done.stderr
    assert "200% was asked for" in done.stderr
    assert not (tmp_path / "out").exists()
    assert lowbit_here(*asked, "--no-verify", "--max-kl", "0.1").returncode == 2


def test_compare_is_sorted_json(lowbit_here: Run, tmp_path: Path) -> None:
    artifacts = [write_artifact(tmp_path / name, name, 100, kl, 0.4, 9.0) for name, kl in (("rtn", 0.2), ("gptq", 0.1))]
    rows = json.loads(lowbit_here("compare", *artifacts, "--json").stdout)
    assert [row["kl"] for row in rows] == [0.0, 0.1, 0.2]
    shown = lowbit_here("compare", *artifacts).stdout
    assert "◆" in shown
    assert max(map(len, shown.splitlines())) <= 80
