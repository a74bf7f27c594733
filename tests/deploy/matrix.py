"""Deployments that cover every pair of options at least once, and the Jobs of every kind of recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any

from lowbit.api.deploy import quantize_files, serve_files
from lowbit.api.deploy_quantize import QuantizeWish, quantize_spec
from lowbit.api.deploy_serve import serve_spec
from lowbit.api.deploy_wish import ServeWish
from lowbit.deploy.objects.job import quantize_templates
from lowbit.deploy.objects.serve import DEV_VALUES, serve_templates
from lowbit.deploy.template import Template
from lowbit.runtimes.description import BitsAndBytes

SERVE: dict[str, list[Any]] = {
    "engine": [
        ("vllm", "gptq", "cuda"), ("vllm", "awq", "cuda"), ("vllm", "fp8", "cuda"), ("vllm", "int8_sq", "cuda"),
        ("vllm", "bf16", "cuda"), ("vllm", "awq", "cpu"), ("vllm", "w8a8", "cpu"), ("llama.cpp", "q4_k_m", "cpu"),
        ("llama.cpp", "q8_0", "cpu"), ("llama.cpp", "q3_k_s", "cuda"), ("transformers", "bf16", "cpu"),
        ("transformers", "bf16", "cuda"), ("transformers", "nf4", "cuda"), ("tensorrt-llm", "fp8_static", "cuda"),
    ],
    "source": ["claim:models/llama", "image:registry.example.com/models/llama:1.0", "hub:org/name@main"],
    "autoscale": ["none", "hpa", "keda"],
    "route": ["none", "ingress", "gateway"],
    "shape": ["one", "two-gpus", "nodes", "kserve"],
    "secret": [None, ""],
    "monitoring": [True, False],
    "replicas": [1, 3],
    "extras": ["plain", "nodes-labels", "load-in-4bit", "load-in-8bit", "pinned"],
}  # fmt: skip
DIGEST = "sha256:" + "0123456789abcdef" * 4


@dataclass(frozen=True)
class Case:
    """One deployment: its templates, its files, and the values of its profiles."""

    name: str
    templates: list[Template]
    files: dict[str, str]
    release: str
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)


def allowed(row: dict[str, Any]) -> bool:
    """Whether lowbit deploys this combination; what it refuses is tested elsewhere."""
    runtime, method, device = row["engine"]
    if row["shape"] in ("nodes", "kserve") and (runtime, device) != ("vllm", "cuda"):
        return False
    if row["shape"] == "two-gpus" and (device == "cpu" or runtime in ("transformers", "llama.cpp")):
        return False
    if row["shape"] in ("nodes", "kserve") and row["autoscale"] != "none":
        return False
    if row["shape"] == "kserve" and row["route"] != "none":
        return False
    if row["autoscale"] == "keda" and runtime in ("transformers", "tensorrt-llm"):
        return False
    if row["autoscale"] == "hpa" and runtime in ("transformers", "tensorrt-llm") and device == "cuda":
        return False
    return not (row["extras"].startswith("load-in") and (runtime, method) != ("transformers", "bf16"))


def pairwise() -> list[dict[str, Any]]:
    """Rows that hold every pair of values that any allowed row holds; greedy, always the same."""
    rows = [row for row in _rows() if allowed(row)]
    numbers: dict[tuple[Any, ...], int] = {}
    masks = [sum(1 << numbers.setdefault(pair, len(numbers)) for pair in _pairs(row)) for row in rows]
    left = (1 << len(numbers)) - 1
    chosen: list[dict[str, Any]] = []
    while left:
        best = max(range(len(rows)), key=lambda index: (left & masks[index]).bit_count())
        chosen.append(rows[best])
        left &= ~masks[best]
    return chosen


def _rows() -> Iterator[dict[str, Any]]:
    for values in product(*SERVE.values()):
        yield dict(zip(SERVE, values, strict=True))


def _pairs(row: dict[str, Any]) -> list[tuple[Any, ...]]:
    return list(combinations([(name, str(value)) for name, value in row.items()], 2))


def serve_case(row: dict[str, Any], model: Path, index: int) -> Case:
    """The deployment of a row."""
    runtime, method, device = row["engine"]
    extras = row["extras"]
    loads = {"load-in-4bit": BitsAndBytes(4), "load-in-8bit": BitsAndBytes(8)}
    source = row["source"]
    wish = ServeWish(
        runtime=runtime,
        method=method,
        device=device,
        name=f"case-{index}",
        source=f"{source}-{method}.gguf" if source.startswith("claim") and runtime == "llama.cpp" else source,
        autoscale=row["autoscale"],
        route=row["route"],
        gpus={"two-gpus": 2, "nodes": 2}.get(row["shape"]),
        nodes=2 if row["shape"] == "nodes" else 1,
        kserve=row["shape"] == "kserve",
        secret=row["secret"],
        monitoring=row["monitoring"],
        replicas=row["replicas"],
        context=128,
        bitsandbytes=loads.get(extras),
        token_secret="hub" if source.startswith("hub") else "",
        node_selector={"nvidia.com/gpu.product": "NVIDIA-L4"} if extras == "nodes-labels" else None,
        image=f"registry.example.com/server:1.0@{DIGEST}" if extras == "pinned" or method == "nf4" else None,
    )
    made = serve_spec(model, wish)
    name = "-".join(str(value) for value in (index, runtime, method, row["shape"], row["autoscale"], row["route"]))
    return Case(name, serve_templates(made.spec), serve_files(made, namespace="serving"), made.spec.name,
                {"dev": DEV_VALUES, "prod": {}})  # fmt: skip


JOBS: list[dict[str, Any]] = [
    {"methods": ("gptq",), "changes": {"dataset": "pydoc"}},
    {"methods": ("gptq",), "changes": {"dataset": "c4"}, "token_secret": "hub"},
    {"methods": ("awq",), "changes": {"dataset": "pydoc"}, "queue": "team-a"},
    {"methods": ("int8_sq",), "changes": {"dataset": "pydoc"}, "storage_class": "fast"},
    {"methods": ("fp8_static",), "changes": {"dataset": "pydoc"}, "image": f"registry.example.com/lowbit:1@{DIGEST}"},
    {"methods": ("fp8",), "device": "cpu", "create_claim": False},
    {"methods": ("q4_k_m",), "node_selector": {"kubernetes.io/arch": "amd64"}},
    {"methods": ("gptq", "awq", "w8a8"), "changes": {"dataset": "pydoc"}, "parallel": 3},
    {"methods": ("gptq", "q4_k_m"), "changes": {"dataset": "pydoc"}, "device": "cpu", "queue": "team-a"},
    {"methods": ("nf4",), "claim": ""},
    {"methods": ("gptq",), "changes": {"dataset": "pydoc"}, "gpus": 4},
    {"methods": ("gptq", "awq"), "changes": {"dataset": "pydoc"}, "gpus": 2, "parallel": 2},
    {"methods": ("gptq",), "changes": {"dataset": "pydoc"}, "gpus": 8, "nodes": 2},
    {"methods": ("awq",), "changes": {"dataset": "c4"}, "nodes": 3, "token_secret": "hub", "queue": "team-a"},
    {"methods": ("w8a8",), "gpus": 2, "nodes": 2, "claim": "", "storage_class": "fast", "name": "x" * 60},
]


def job_case(settings: dict[str, Any], model: Path, index: int) -> Case:
    """The Job of a row."""
    spec = quantize_spec(model, QuantizeWish(**({"name": f"job-{index}"} | settings)))
    return Case(f"{index}-{'-'.join(settings['methods'])}", quantize_templates(spec),
                quantize_files(spec, namespace="serving"), spec.name, {"prod": {}})  # fmt: skip


def cases(model: Path) -> list[Case]:
    """All of them."""
    served: list[Callable[[], Case]] = [
        lambda row=row, i=i: serve_case(row, model, i) for i, row in enumerate(pairwise())
    ]
    jobs: list[Callable[[], Case]] = [lambda row=row, i=i: job_case(row, model, i) for i, row in enumerate(JOBS)]
    return [make() for make in [*served, *jobs]]
