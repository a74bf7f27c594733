"""Specs -> folders: Kustomize and Helm, or files for a machine without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowbit import __version__
from lowbit.api.deploy_serve import ServeDeployment
from lowbit.core.errors import RecipeError, did_you_mean
from lowbit.deploy.objects.job import quantize_templates
from lowbit.deploy.objects.serve import DEV_VALUES, load_seconds, serve_templates
from lowbit.deploy.outputs import helm, kustomize, local
from lowbit.deploy.outputs.files import write_folder
from lowbit.deploy.outputs.guide import quantize_guide, serve_guide
from lowbit.deploy.spec import QuantizeSpec, ServeSpec

TARGETS = ("kubernetes", "compose", "systemd", "ollama")


def serve_files(
    made: ServeDeployment, *, target: str = "kubernetes", namespace: str = "", models: str = "./models",
    program: tuple[str, ...] = (),
) -> dict[str, str]:  # fmt: skip
    """Relative path -> text. models: folder with the model on this machine (compose, systemd, ollama). program: what starts
    the runtime here (systemd). Raises RecipeError for an unknown target."""
    _known(target)
    spec = made.spec
    if target == "compose":
        return local.compose_serve(spec, models)
    local_model = str(Path(models).absolute() / Path(spec.location).name)
    if target == "systemd":
        args = [local_model if word == spec.location else word for word in spec.args]
        args = ["127.0.0.1" if word == "0.0.0.0" else word for word in args]
        return local.systemd_serve(spec, list(program or made.runtime.program), args)
    if target == "ollama":
        return local.ollama(spec, local_model, made.options.context or 4096)
    title = f"{made.artifact.name} ({made.artifact.scheme or made.artifact.format}) by {made.runtime.title}"
    return {**server_folder(spec, title, namespace), "facts.json": _facts(made)}


def server_folder(spec: ServeSpec, title: str, namespace: str = "") -> dict[str, str]:
    """Kustomize tree, chart and guide of a server."""
    templates = serve_templates(spec)
    profiles: dict[str, dict[str, Any]] = {"dev": DEV_VALUES, "prod": {}}
    chart = helm.chart(templates, name=spec.name, description=title, version=__version__, profiles={"dev": DEV_VALUES})
    files = {f"chart/{name}": text for name, text in chart.items()}
    tree = kustomize.tree(templates, name=spec.name, namespace=namespace, profiles=profiles)
    files |= {f"kustomize/{name}": text for name, text in tree.items()}
    return files | {"README.md": serve_guide(spec, title, namespace)}


def quantize_files(
    spec: QuantizeSpec, *, target: str = "kubernetes", namespace: str = "", models: str = "./models",
    output: str = "./output",
) -> dict[str, str]:  # fmt: skip
    """Relative path -> text. models, output: folders on this machine (compose)."""
    _known(target)
    if target == "compose":
        return local.compose_quantize(spec, models, output)
    if target != "kubernetes":
        raise RecipeError(f"a quantization is no service of {target}", hint="--target kubernetes or compose")
    templates = quantize_templates(spec)
    title = f"quantizes {spec.model} with {', '.join(run.name for run in spec.runs)}"
    chart = helm.chart(templates, name=spec.name, description=title, version=__version__, profiles={})
    tree = kustomize.tree(templates, name=spec.name, namespace=namespace, profiles={"prod": {}})
    files = {f"chart/{name}": text for name, text in chart.items()}
    files |= {f"kustomize/{name}": text for name, text in tree.items()}
    return files | {"README.md": quantize_guide(spec, title, namespace)}


def write(files: dict[str, str], folder: Path) -> list[Path]:
    """Write them as `folder`. Raises OutputError."""
    return write_folder(folder, files)


def _known(target: str) -> None:
    if target not in TARGETS:
        raise RecipeError(f"target {target!r} is unknown{did_you_mean(target, TARGETS)}",
                          hint=f"one of {', '.join(TARGETS)}")  # fmt: skip


def _facts(made: ServeDeployment) -> str:
    """What the sizes were made from, for reviewers."""
    memory = made.memory
    facts = {
        "artifact": made.artifact.name,
        "format": made.artifact.format,
        "numbers": list(made.artifact.labels),
        "weight_bytes": made.artifact.weight_bytes,
        "context": made.options.context,
        "parallel": made.options.parallel,
        "device_memory": None if memory is None else memory.to_dict(),
        "hardware": None if made.hardware is None else made.hardware.id,
        "seconds_to_ready_at_most": load_seconds(made.spec),
    }
    return json.dumps(facts, indent=2) + "\n"
