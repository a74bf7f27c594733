"""The command line as a user meets it: exit codes, one-line errors, data on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit
from tests.in_process import Run


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("lowbit")
    return subprocess.run([script, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cli") / "artifact"
    done = run("quantize", tiny_llama, "--method", "gptq", "--group-size", "auto", "--dataset", "pydoc",
               "--num-samples", "8", "--seq-len", "64", "-o", output)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "gptq 4-bit g64" in done.stdout
    assert "quantize: 3/3" in done.stderr
    return output


def test_help_needs_no_heavy_import() -> None:
    code = "import sys, lowbit.cli; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    shown = run("--help")
    assert shown.returncode == 0
    for verb in ("quantize", "evaluate", "compare", "inspect", "recipe", "env", "demo"):
        assert verb in shown.stdout
        assert "Example" in run(verb, "--help").stdout or verb in ("recipe", "env")


def test_wrong_usage_says_what_is_wrong() -> None:
    for arguments in (["quantize"], ["quantize", "MODEL", "--bitz", "4"], ["nonsense"]):
        done = run(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "Missing argument" in done.stderr or "No such" in done.stderr


def test_version() -> None:
    assert run("--version").stdout.strip() == f"lowbit {lowbit.__version__}"


def test_json_is_data_alone(artifact: Path) -> None:
    shown = run("inspect", artifact, "--json", "--check")
    record = json.loads(shown.stdout)
    assert record["changed_files"] == []
    assert record["recipe"]["method"] == "gptq"
    rows = json.loads(run("compare", artifact, "--json").stdout)
    assert rows[0]["kl"] == record["verification"]["kl"]
    recipes = json.loads(run("recipe", "list", "--json").stdout)
    assert {"gptq", "rtn", "fp16"} <= recipes.keys()


def test_evaluate_finds_the_base_and_prints_json(lowbit_here: Run, artifact: Path, tiny_llama: Path) -> None:
    measured = json.loads(lowbit_here("evaluate", artifact, "--windows", "2", "--context", "64", "--json").stdout)
    assert measured["base"] == str(tiny_llama)
    assert measured["kl"] > 0
    assert measured["tokens"] == 126


def test_tables(lowbit_here: Run, artifact: Path) -> None:
    markdown = lowbit_here("compare", artifact, "--markdown").stdout.splitlines()
    assert markdown[0].startswith("| method | bits/weight |")
    assert markdown[2].startswith("| gptq 4-bit g64 |")
    assert "worst layers" in lowbit_here("inspect", artifact).stdout


def test_changed_file_is_noticed(lowbit_here: Run, artifact: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    shown = lowbit_here("inspect", copy, "--check")
    assert shown.returncode == 1
    assert "model.safetensors differ" in shown.stderr


def test_recipe_file_gives_the_same_artifact_as_flags(
    lowbit_here: Run, artifact: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    import yaml

    record = json.loads((artifact / "lowbit.json").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(record["recipe"]))
    done = lowbit_here(
        "quantize", tiny_llama, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "again", "--quiet"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again/model.safetensors").read_bytes() == (artifact / "model.safetensors").read_bytes()


def test_dry_run_names_every_layer_and_the_exact_size(lowbit_here: Run, artifact: Path, tiny_llama: Path) -> None:
    shown = lowbit_here("quantize", tiny_llama, "--group-size", "64", "--dry-run", "--json")
    plan = json.loads(shown.stdout)
    assert len(plan["layers"]) == 21
    assert 2**29 < plan["predicted_memory"] < 2**32
    assert plan["predicted_seconds"] > 0
    assert plan["bytes"] == json.loads((artifact / "lowbit.json").read_text())["bytes"]
    header = int.from_bytes((artifact / "model.safetensors").read_bytes()[:8], "little")
    assert (artifact / "model.safetensors").stat().st_size == plan["bytes"] + 8 + header


def test_dry_run_of_a_gguf_file_says_what_it_takes(lowbit_here: Run, tiny_llama: Path) -> None:
    text = ["--dataset", "pydoc", "--num-samples", "8", "--seq-len", "64"]
    plain, second = (
        json.loads(lowbit_here("quantize", tiny_llama, "--method", "q8_0", *more, "--dry-run", "--json").stdout)
        for more in ([], text)
    )
    assert plain["bytes"] == second["bytes"] > 0
    assert 2**28 < plain["predicted_memory"] < second["predicted_memory"] < 2**32
    assert plain["predicted_seconds"] > 0
    shown = lowbit_here("quantize", tiny_llama, "--method", "q8_0", *text, "--dry-run")
    assert "would take about" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        (["quantize", "/nowhere", "-o", "x"], 1, "does not exist", "hub id"),
        (["quantize", "MODEL", "--method", "gtpq", "-o", "x"], 2, "did you mean 'gptq'", "one of"),
        (["quantize", "MODEL", "--group-size", "48", "-o", "x"], 2, "does not divide", "--group-size"),
        (["quantize", "MODEL", "--group-size", "64"], 2, "no output", "-o DIR"),
        (["quantize", "MODEL", "--option", "percdamp", "-o", "x"], 2, "NAME=VALUE", "percdamp="),
        (["quantize", "MODEL", "--device", "cuda:7", "--group-size", "64", "-o", "x"], 2, "not available", "--device"),
        (["quantize", "MODEL", "--max-memory", "lots", "-o", "x"], 2, "amount of memory", "2GiB"),
        (["quantize", "no-such-org-1234/no-model", "-o", "x"], 1, "could not be downloaded", "run it again"),
        (["inspect", "MODEL"], 1, "no lowbit artifact", "quantize"),
        (["recipe", "show", "gtpq"], 2, "did you mean 'gptq'", "one of"),
        (["evaluate", "MODEL", "--dataset", "wikitxt"], 1, "did you mean 'wikitext'", "local"),
    ],
)
def test_errors_are_one_line_and_a_hint(
    lowbit_here: Run, arguments: list[str], code: int, error: str, hint: str, tiny_llama: Path, tmp_path: Path
) -> None:
    given = [str(tiny_llama) if argument == "MODEL" else argument for argument in arguments]
    given = [str(tmp_path / "x") if argument == "x" else argument for argument in given]
    done = lowbit_here(*given)
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-2].startswith("error: ")
    assert error in lines[-2]
    assert lines[-1].startswith("hint: ")
    assert hint in lines[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
