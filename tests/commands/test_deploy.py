"""lowbit deploy as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.core.errors import LowbitError


def run(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["deploy", *map(str, words)])
    if isinstance(done.exception, LowbitError):
        raise done.exception
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_serve_writes_then_validate_and_plan_read(tiny_llama: Path, tmp_path: Path) -> None:
    code, text = run("serve", tiny_llama, "--method", "q4_k_m", "--runtime", "llama.cpp", "--cpu", "3", "--context", "128",
                     "--autoscale", "hpa", "--namespace", "models", "-o", tmp_path / "d")  # fmt: skip
    assert code == 0
    assert "by llama.cpp" in text
    overlay = tmp_path / "d/kustomize/overlays/prod"
    assert run("validate", overlay)[0] == 0
    plan = json.loads(run("plan", overlay, "--json")[1])
    assert plan["workloads"][0]["cpu"] == 3
    assert plan["total"]["most"]["cpu"] == 12
    assert "create secret generic" in (tmp_path / "d/README.md").read_text()
    run("serve", tiny_llama, "--method", "awq", "-o", tmp_path / "d")  # its own folder is replaced
    assert not (tmp_path / "d/kustomize/overlays/prod/autoscaler.yaml").exists()


def test_quantize_writes_a_job(tiny_llama: Path, tmp_path: Path) -> None:
    code, text = run("quantize", tiny_llama, "--methods", "gptq,awq", "--dataset", "pydoc", "--num-samples", "8",
                     "--seq-len", "64", "-o", tmp_path / "j")  # fmt: skip
    assert code == 0
    assert "2 runs" in text
    config = yaml.safe_load((tmp_path / "j/kustomize/base/recipes.yaml").read_text())["data"]
    assert yaml.safe_load(config["1.yaml"])["calibration"]["num_samples"] == 8
    assert config["0.output"] == f"{tiny_llama.name}-gptq"


def test_quantize_on_several_gpus_and_nodes(tiny_llama: Path, tmp_path: Path) -> None:
    words = ["--method", "gptq", "--dataset", "pydoc", "--image", "registry.example.com/lowbit:1"]
    _, text = run("quantize", tiny_llama, *words, "--gpus", "4", "-o", tmp_path / "one")
    assert "4 GPUs" in text
    job = yaml.safe_load((tmp_path / "one/kustomize/base/job.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    box = pod["containers"][0]
    assert box["args"][-4:] == ["--device", "cuda", "--gpus", "4"]
    assert box["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "4Gi"}} in pod["volumes"]

    run("quantize", tiny_llama, *words, "--nodes", "2", "--gpus", "8", "--name", "both", "-o", tmp_path / "two")
    base = tmp_path / "two/kustomize/base"
    group = yaml.safe_load((base / "jobset.yaml").read_text())["spec"]
    assert group["network"]["subdomain"] == "both"
    box = group["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert box["command"] == ["torchrun"]
    assert box["args"][:8] == ["--nnodes", "2", "--nproc-per-node", "8", "--node-rank", "$(JOB_COMPLETION_INDEX)",
                               "--master-addr", "both-node-0-0.both"]  # fmt: skip
    assert box["args"][box["args"].index("-m") + 1] == "lowbit.deploy.job_entry"
    assert yaml.safe_load((base / "output.yaml").read_text())["spec"]["accessModes"] == ["ReadWriteMany"]
    code, text = run("plan", base)
    assert (code, text.splitlines()[-1].split(",")[0]) == (0, "at most: 16 GPUs")


def test_targets_without_a_cluster(tiny_llama: Path, tmp_path: Path) -> None:
    words = [
        "serve",
        tiny_llama,
        "--method",
        "q4_k_m",
        "--runtime",
        "llama.cpp",
        "--context",
        "128",
        "--models",
        tmp_path,
    ]
    run(*words, "--target", "compose", "-o", tmp_path / "c")
    service = yaml.safe_load((tmp_path / "c/compose.yaml").read_text())["services"]["server"]
    assert service["read_only"] is True
    assert service["image"].startswith("ghcr.io/ggml-org/llama.cpp:server-b")
    assert service["volumes"] == [f"{tmp_path}:/models:ro"]
    assert service["ports"] == ["127.0.0.1:8080:8080"]
    assert (tmp_path / "c/.env.example").read_text() == "LLAMA_API_KEY=\n"
    run(*words, "--target", "systemd", "--program", "/usr/bin/llama-server", "-o", tmp_path / "s")
    unit = next((tmp_path / "s").glob("*.service")).read_text()
    assert f"ExecStart=/usr/bin/llama-server --model {tmp_path}/" in unit
    assert "--host 127.0.0.1" in unit
    run(*words, "--target", "ollama", "-o", tmp_path / "o")
    assert (tmp_path / "o/Modelfile").read_text().startswith(f"FROM {tmp_path}/")
    run("quantize", tiny_llama, "--method", "q4_k_m", "--target", "compose", "-o", tmp_path / "q")
    assert (tmp_path / "q/recipes/0.yaml").is_file()


def test_validate_finds_and_mends(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(
        "apiVersion: batch/v1\nkind: Job\nmetadata: {name: x}\nspec:\n  template:\n    spec:\n      containers:\n"
        "      - {name: a, image: 'b:1', resources: {limits: {memory: 32 GB}}}\n"
    )
    code, text = run("validate", file)
    assert code == 3
    assert f"{file}:6: error [restart-policy]" in text
    assert "'32 GB' is no quantity" in text
    code, text = run("validate", file, "--fix")
    assert code == 0, text
    assert yaml.safe_load(file.read_text())["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert json.loads(run("validate", file, "--json")[1])["findings"] == []


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["serve", "MODEL", "--runtime", "llama.cpp"], "does not read dense", "--method q4_k_m"),
        (["serve", "MODEL", "--method", "q4_k_m"], "GGUF left vLLM", "recommend"),
        (["serve", "MODEL", "--method", "fp8", "--hardware", "v100"], "needs compute capability", "recommend"),
        (["serve", "MODEL", "--method", "nf4"], "which its image lacks", "--image"),
        (["serve", "MODEL", "--method", "awq", "--image", "x:latest"], "not pinned", "REPOSITORY:TAG"),
        (["serve", "MODEL", "--method", "awq", "--context", "99999"], "made for 256 tokens", "--context 256"),
        (["serve", "MODEL", "--method", "awq", "--source", "s3:x"], "is unknown", "claim:NAME"),
        (["serve", "MODEL", "--method", "awq", "--target", "kubernets"], "did you mean 'kubernetes'", "one of"),
        (["serve", "MODEL", "--runtime", "transformers", "--autoscale", "keda"], "no queue", "--autoscale none"),
        (["serve", "MODEL", "--load-in", "nf4"], "in transformers", "--runtime transformers"),
        (["serve", "MODEL", "--method", "awq", "--gpus", "3"], "4 attention heads", "divides them"),
        (["serve", "MODEL", "--method", "awq", "--gpus", "4", "--nodes", "2"], "over 8 GPUs", "divides them"),
        (["quantize", "MODEL", "--methods", "gptq,awq", "--nodes", "2"], "several runs", "--parallel N"),
        (["quantize", "MODEL", "--method", "q4_k_m", "--gpus", "2", "--device", "cuda"], "by one process", "neither"),
        (["quantize", "MODEL", "--method", "gptq", "--gpus", "2", "--device", "cpu"], "on GPUs alone", "--device cuda"),
        (["quantize", "MODEL", "--method", "autoround", "--gpus", "2"], "learned on one GPU", "neither"),
        (
            ["quantize", "MODEL", "--method", "gptq", "--nodes", "2", "--gpus", "8", "--num-samples", "9"],
            "by 16 GPUs",
            "at least 16",
        ),
        (["quantize", "MODEL", "--method", "gptq", "--nodes", "2", "--target", "compose"], "one machine", "--nodes 1"),
        (["quantize", "MODEL", "--method", "gtpq"], "did you mean 'gptq'", "one of"),
        (["validate", "/nowhere.yaml"], "does not exist", "YAML"),
        (["apply", "/nowhere.yaml", "--dry-run", "client"], "is unknown", "server"),
    ],
)
def test_refusals_say_what_would_do(
    words: list[str], message: str, hint: str, tiny_llama: Path, tmp_path: Path
) -> None:
    given = [str(tiny_llama) if word == "MODEL" else word for word in words]
    given += ["-o", str(tmp_path / "x")] if words[0] in ("serve", "quantize") else []
    with pytest.raises(LowbitError) as caught:
        run(*given)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)
    assert not (tmp_path / "x").exists()


def test_foreign_folders_are_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("kept")
    with pytest.raises(LowbitError, match="not written by lowbit deploy"):
        run("serve", tiny_llama, "--method", "awq", "-o", tmp_path / "mine")
    assert (tmp_path / "mine/file").read_text() == "kept"
