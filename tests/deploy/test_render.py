"""The Kustomize tree and the Helm chart, rendered by the real kubectl and helm, are the same objects."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowbit.deploy.outputs.files import write_folder
from lowbit.deploy.outputs.helm import chart
from lowbit.deploy.outputs.kustomize import difference
from lowbit.deploy.template import Release, Template, Text, Value, When, objects

from .matrix import Case, pairwise


def rendered(program: str, *arguments: str | Path) -> list[dict[str, Any]]:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def keyed(documents: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name, without what only a renderer adds (the namespace) or drops (empty mappings and lists)."""
    found = {}
    for document in documents:
        document["metadata"].pop("namespace", None)
        found[document["kind"], document["metadata"]["name"]] = pruned(document)
    return found


def pruned(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: pruned(value) for key, value in tree.items()
                if not (key in ("annotations", "nodeSelector", "tolerations") and not value)}  # fmt: skip
    return [pruned(item) for item in tree] if isinstance(tree, list) else tree


def test_there_are_enough_cases() -> None:
    assert len(pairwise()) >= 50


def test_helm_and_kustomize_render_the_same_objects(
    matrix: list[Case], helm: str, kubectl: str, tmp_path: Path
) -> None:
    assert len(matrix) >= 60
    compared = 0
    for case in matrix:
        folder = tmp_path / case.name
        write_folder(folder, case.files)
        linted = subprocess.run([helm, "lint", "--strict", folder / "chart"], capture_output=True, text=True)
        assert linted.returncode == 0, f"{case.name}: {linted.stdout}{linted.stderr}"
        for profile, values in case.profiles.items():
            more = [] if profile == "prod" else ["-f", folder / f"chart/values-{profile}.yaml"]
            by_helm = keyed(rendered(helm, "template", case.release, folder / "chart", *more))
            by_kubectl = keyed(rendered(kubectl, "kustomize", folder / f"kustomize/overlays/{profile}"))
            direct = keyed(objects(case.templates, case.release, values))
            assert by_helm == by_kubectl == direct, case.name
            compared += len(direct)
    assert compared > 500


def test_values_change_what_is_rendered(matrix: list[Case], helm: str, tmp_path: Path) -> None:
    case = next(case for case in matrix if "llama.cpp-q4_k_m" in case.name and "-none-" not in case.name)
    write_folder(tmp_path / "d", case.files)
    chart = tmp_path / "d/chart"
    made = keyed(rendered(helm, "template", "other", chart, "--set", "resources.cpu=3,image.tag=x",
                          "--set", "autoscaling.enabled=false"))  # fmt: skip
    container = made["Deployment", "other"]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][container["args"].index("--threads") + 1] == "3"
    assert container["resources"]["limits"]["cpu"] == "3"
    assert ":x" in container["image"]
    for wrong in ("image.tag=latest", "replicas=many", "nonsense=1", "resources.memory=32 GB"):
        refused = subprocess.run([helm, "template", "x", chart, "--set", wrong], capture_output=True, text=True)
        assert refused.returncode, wrong


def test_what_looks_like_a_template_stays_data(helm: str, tmp_path: Path) -> None:
    """Text with braces, quotes, colons and line ends, and every kind of leaf, come out of Helm as they went in."""
    awkward = {"a": "{{ .Values.x }}", "b": "it's: #1", "c": "two\nlines {{x}}\n", "d": "true", "e": "1", "f": True,
               "g": [[1, "2"], {"h": {}}, []], "k.io/x": None}  # fmt: skip
    tree = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": Release("-x")}, "data": awkward,
            "more": [When("on", False, {"z": 1}), When("off", False, "kept", negate=True)],
            "text": Text(("a'", Value("v", "1"), Release())), "list": Value("l", [{"a": 1}])}  # fmt: skip
    files = chart([Template("x.yaml", tree)], name="x", description="d", version="1.0.0", profiles={})
    write_folder(tmp_path / "chart", files)
    assert rendered(helm, "template", "rel", tmp_path / "chart") == objects([Template("x.yaml", tree)], "rel")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [2]}, "d/e": 3}),
        ({"spec": {"replicas": 1}}, {"spec": {}}),
        ({"a": 1}, {"a": 1}),
    ],
)
def test_difference_is_a_json_patch(before: Any, after: Any) -> None:
    import jsonpatch

    assert jsonpatch.apply_patch(before, difference(before, after)) == after
