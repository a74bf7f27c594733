"""Every object of the matrix against what others know of Kubernetes: the official client's models, and its schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lowbit.deploy.template import objects

from .matrix import Case

kubernetes_validate = pytest.importorskip("kubernetes_validate")
client = pytest.importorskip("kubernetes.client")

VERSIONS = ("1.34", "1.35", "1.36", "1.37")
CRDS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "crds.yaml").read_text())
MODELS = {
    "ServiceAccount": "V1ServiceAccount", "Deployment": "V1Deployment", "Service": "V1Service", "Job": "V1Job",
    "NetworkPolicy": "V1NetworkPolicy", "PodDisruptionBudget": "V1PodDisruptionBudget", "ConfigMap": "V1ConfigMap",
    "HorizontalPodAutoscaler": "V2HorizontalPodAutoscaler", "Ingress": "V1Ingress",
    "PersistentVolumeClaim": "V1PersistentVolumeClaim",
}  # fmt: skip


@pytest.fixture(scope="module")
def every(matrix: list[Case]) -> list[dict[str, Any]]:
    """All objects of all cases and profiles, each once."""
    found = {}
    for case in matrix:
        for values in case.profiles.values():
            for each in objects(case.templates, case.release, values):
                found[json.dumps(each, sort_keys=True)] = each
    assert len(found) > 300
    return list(found.values())


def kind_of(each: dict[str, Any]) -> str:
    return f"{each['apiVersion']}/{each['kind']}"


def test_models_of_the_official_client(every: list[dict[str, Any]]) -> None:
    checked = 0
    for each in every:
        templates = [] if kind_of(each) not in CRDS else _pod_specs(each)
        if kind_of(each) not in CRDS:
            getattr(client, MODELS[each["kind"]]).model_validate(each, strict=False)
            checked += 1
        for spec in templates:
            client.V1PodSpec.model_validate(spec)
            checked += 1
        for group in each["spec"]["replicatedJobs"] if each["kind"] == "JobSet" else ():
            client.V1JobTemplateSpec.model_validate(group["template"])
            checked += 1
    assert checked > 300


def _pod_specs(each: dict[str, Any]) -> list[dict[str, Any]]:
    spec = each["spec"]
    if each["kind"] == "LLMInferenceService":
        return [spec["template"]]
    groups = spec.get("leaderWorkerTemplate", {})
    return [groups[key]["spec"] for key in ("leaderTemplate", "workerTemplate") if key in groups]


@pytest.mark.parametrize("version", VERSIONS)
def test_schemas_of_each_version(every: list[dict[str, Any]], version: str) -> None:
    for each in every:
        if kind_of(each) not in CRDS:  # an unknown kind raises, which is a failure here
            kubernetes_validate.validate(each, version, strict=True)
        for group in each["spec"]["replicatedJobs"] if each["kind"] == "JobSet" else ():
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "of-a-jobset"}, **group["template"]}
            kubernetes_validate.validate(job, version, strict=True)


def test_custom_resources(every: list[dict[str, Any]]) -> None:
    seen = set()
    for each in every:
        if kind_of(each) in CRDS:
            jsonschema.validate(each["spec"], CRDS[kind_of(each)])
            seen.add(kind_of(each))
    assert seen == CRDS.keys()


def test_the_checks_can_fail(every: list[dict[str, Any]]) -> None:
    deployment = json.loads(json.dumps(next(each for each in every if each["kind"] == "Deployment")))
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(ValueError, match="imagePullPolice"):
        client.V1Deployment.model_validate(deployment)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.37", strict=True)
    scaled = json.loads(json.dumps(next(each for each in every if each["kind"] == "ScaledObject")))
    scaled["spec"]["maxReplicas"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(scaled["spec"], CRDS[kind_of(scaled)])
