"""The six classic old manifests become new ones with the same intent, which the validator finds nothing wrong with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lowbit.api.deploy import write
from lowbit.api.deploy_migrate import Migration, migrate
from lowbit.core.errors import RecipeError
from lowbit.deploy.documents import Document, read_documents
from lowbit.deploy.validate import validate
from lowbit.recipe import Recipe

OLD = """
apiVersion: batch/v1
kind: Job
metadata: {name: gptq}
spec:
  template:
    spec:
      restartPolicy: Never
      containers:
      - name: q
        image: pytorch/pytorch:2.1.0-cuda12.1-cudnn8-runtime
        command: [python, -m, auto_gptq.quantize]
        args: [--model_name=/in/Llama-7b, --output_dir=/out/Llama-7b-gptq, --bits=3, --group_size=64, --desc_act=true,
               --dataset=wikitext, --num_samples=99]
        resources: {limits: {nvidia.com/gpu: 1, memory: 32Gi}}
        volumeMounts: [{name: i, mountPath: /in}, {name: o, mountPath: /out}]
      volumes:
      - {name: i, persistentVolumeClaim: {claimName: claim-in}}
      - {name: o, persistentVolumeClaim: {claimName: claim-out}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: awq}
data:
  q.py: |
    from awq import AutoAWQForCausalLM
    model_path = "/in/Llama-7b"
    quant_path = "/out/Llama-7b-awq"
    quant_config = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    model = AutoAWQForCausalLM.from_pretrained(model_path)
    model.save_quantized(quant_path)
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: chat}
spec:
  replicas: 3
  selector: {matchLabels: {app: chat}}
  template:
    metadata: {labels: {app: chat}}
    spec:
      containers:
      - name: vllm
        image: vllm/vllm-openai:latest
        args: [--model=/m/Llama-2-7b-awq, --quantization=awq, --dtype=float16, --max-model-len=2048, --tensor-parallel-size=2,
               --gpu-memory-utilization=0.8]
        resources: {limits: {nvidia.com/gpu: 2, memory: 16Gi}}
        volumeMounts: [{name: m, mountPath: /m}, {name: shm, mountPath: /dev/shm}]
      volumes:
      - {name: m, persistentVolumeClaim: {claimName: quantized}}
      - {name: shm, emptyDir: {medium: Memory, sizeLimit: 8Gi}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: edge}
spec:
  replicas: 2
  selector: {matchLabels: {app: edge}}
  template:
    spec:
      containers:
      - name: llama
        image: ghcr.io/ggerganov/llama.cpp:server
        args: [--model=/m/llama-2-7b.Q4_K_M.gguf, --ctx-size=4096, --threads=6, --n-gpu-layers=0]
        resources: {limits: {cpu: "6", memory: 16Gi}, requests: {cpu: "2", memory: 8Gi}}
        volumeMounts: [{name: m, mountPath: /m}]
      volumes:
      - {name: m, persistentVolumeClaim: {claimName: ggufs}}
---
apiVersion: batch/v1
kind: Job
metadata: {name: trt}
spec:
  template:
    spec:
      containers:
      - name: t
        image: nvcr.io/nvidia/tritonserver:24.01-trtllm-python-py3
        command: [python, /app/tensorrt_llm/examples/quantization/quantize.py]
        args: [--model_dir=/in/Llama-7b, --output_dir=/out/trt, --qformat=int8_sq, --calib_size=300]
        resources: {limits: {nvidia.com/gpu: 1, memory: 48Gi}}
---
env:
- {name: LOAD_IN_4BIT, value: "true"}
- {name: BNB_4BIT_COMPUTE_DTYPE, value: float16}
- {name: BNB_4BIT_QUANT_TYPE, value: nf4}
"""


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Migration, dict[str, dict[str, Any]], list[Document]]]:
    """Name -> what it became, its objects by kind, and its documents."""
    folder = tmp_path_factory.mktemp("old")
    (folder / "old.yaml").write_text(OLD)
    found = {}
    for each in migrate(read_documents([folder / "old.yaml"])):
        write(each.files, folder / each.name)
        documents = read_documents([folder / each.name / "kustomize/overlays/prod"])
        found[each.name] = each, {document.kind: document.content for document in documents}, documents
    return found


def test_all_six_and_nothing_wrong_with_them(made: dict[str, Any]) -> None:
    assert list(made) == ["gptq", "awq", "chat", "edge", "trt", "model-server"]
    for name, (each, _, documents) in made.items():
        assert not [(f.rule, f.message) for f in validate(documents)], name
        assert each.notes


def recipe(objects: dict[str, Any]) -> Recipe:
    return Recipe.parse(yaml.safe_load(objects["ConfigMap"]["data"]["0.yaml"]))


def test_gptq_keeps_its_intent(made: dict[str, Any]) -> None:
    objects = made["gptq"][1]
    found = recipe(objects)
    assert (found.method, found.bits, found.group_size, found.format) == ("gptq", 3, 64, "gptq")
    assert (found.calibration.dataset, found.calibration.num_samples) == ("wikitext", 99)
    assert found.options["act_order"] == "static"
    assert objects["ConfigMap"]["data"]["0.output"] == "Llama-7b-gptq"
    spec = objects["Job"]["spec"]["template"]["spec"]
    claims = {
        v["name"]: v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v
    }
    assert claims == {"models": "claim-in", "output": "claim-out"}
    assert "PersistentVolumeClaim" not in objects
    assert spec["containers"][0]["args"][:2] == ["--model", "/models/Llama-7b"]


def test_awq_gets_a_job_beside_the_claims_of_its_neighbour(made: dict[str, Any]) -> None:
    objects = made["awq"][1]
    found = recipe(objects)
    assert ("awq" in found.transforms, found.bits, found.group_size, found.symmetric, found.format) == (
        True, 4, 64, False, "awq")  # fmt: skip
    assert objects["ConfigMap"]["data"]["0.output"] == "Llama-7b-awq"
    volumes = objects["Job"]["spec"]["template"]["spec"]["volumes"]
    assert {"claimName": "claim-in", "readOnly": True} in [v.get("persistentVolumeClaim") for v in volumes]


def test_vllm_keeps_replicas_gpus_context_and_claim(made: dict[str, Any]) -> None:
    deployment = made["chat"][1]["Deployment"]
    box = deployment["spec"]["template"]["spec"]["containers"][0]
    assert deployment["spec"]["replicas"] == 3
    assert box["command"] == ["vllm"]
    line = " ".join(box["args"])
    for words in (
        "serve /models/Llama-2-7b-awq",
        "--max-model-len 2048",
        "--tensor-parallel-size 2",
        "utilization 0.8",
    ):
        assert words in line
    assert "--quantization" not in line
    assert "--dtype" not in line
    assert box["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert ":latest" not in box["image"]
    assert deployment["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == "quantized"


def test_llama_cpp_threads_are_the_cpu_request(made: dict[str, Any]) -> None:
    deployment = made["edge"][1]["Deployment"]
    box = deployment["spec"]["template"]["spec"]["containers"][0]
    assert box["args"][box["args"].index("--threads") + 1] == "6"
    assert box["args"][box["args"].index("--ctx-size") + 1] == "4096"
    assert box["resources"]["requests"]["cpu"] == box["resources"]["limits"]["cpu"] == "6"
    assert box["image"].startswith("ghcr.io/ggml-org/llama.cpp:server-b")
    assert deployment["spec"]["replicas"] == 2


def test_int8_smoothquant_is_kept(made: dict[str, Any]) -> None:
    each, objects, _ = made["trt"]
    found = recipe(objects)
    assert "smoothquant" in found.transforms
    assert (found.bits, found.activations.startswith("int8"), found.calibration.num_samples) == (8, True, 300)
    assert any("vLLM" in note for note in each.notes)


def test_variables_reach_a_launcher_that_reads_them(made: dict[str, Any]) -> None:
    box = made["model-server"][1]["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert "lowbit.runtimes.transformers_server" in box["command"]
    variables = {entry["name"]: entry.get("value") for entry in box["env"]}
    assert (variables["LOAD_IN_4BIT"], variables["BNB_4BIT_COMPUTE_DTYPE"]) == ("true", "float16")


def test_nothing_known_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {ports: [{port: 1}]}\n")
    with pytest.raises(RecipeError, match="known"):
        migrate(read_documents([tmp_path / "x.yaml"]))
