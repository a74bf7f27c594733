"""Between objects: selectors, Services, autoscalers, budgets, monitors, claims."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lowbit.deploy.documents import Document
from lowbit.deploy.validate.finding import REMOVE, Change, Finding
from lowbit.deploy.validate.view import Pod, at, claims_of_one_node, items, mapping, pods

# their controllers make pods, with labels that no manifest shows
_MAKERS = ("RayCluster", "RayService", "InferenceService", "LLMInferenceService", "PyTorchJob", "Rollout")
# labels that controllers give to pods
_GIVEN = ("leaderworkerset.sigs.k8s.io/", "jobset.sigs.k8s.io/", "batch.kubernetes.io/")
_WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet")


def _selector(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    if document.kind not in _WORKLOADS:
        return
    wanted = mapping(at(document.content, "spec", "selector", "matchLabels"))
    for pod in pods(document):
        different = {key: value for key, value in wanted.items() if pod.labels.get(key) != value}
        if different:
            labels = (*pod.path[:-1], "metadata", "labels")
            changes = tuple(Change((*labels, key), value) for key, value in different.items())
            yield Finding(
                "selector",
                "error",
                document,
                ("spec", "selector"),
                f"the pods lack what the selector looks for: {_pairs(different)}",
                "give the pods these labels",
                changes,
            )


def _pairs(labels: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())


def _selected(selector: dict[str, Any], document: Document, documents: Sequence[Document]) -> list[Pod]:
    space = at(document.content, "metadata", "namespace")
    return [
        pod
        for other in documents
        if at(other.content, "metadata", "namespace") == space
        for pod in pods(other)
        if all(pod.labels.get(key) == value or key.startswith(_GIVEN) for key, value in selector.items())
    ]


def _service(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    selector = mapping(at(document.content, "spec", "selector"))
    if any(other.kind in _MAKERS for other in documents):
        return
    if document.kind != "Service" or not selector or not any(True for other in documents for _ in pods(other)):
        return
    found = _selected(selector, document, documents)
    if not found:
        yield Finding(
            "service-selector",
            "error",
            document,
            ("spec", "selector"),
            f"no pod here has {_pairs(selector)}, so the Service leads nowhere",
            "the labels of the pods",
        )
        return
    ports = [port for pod in found for container in pod.containers for port in items(container.content.get("ports"))]
    for index, port in enumerate(items(at(document.content, "spec", "ports"))):
        target = port.get("targetPort", port.get("port"))
        known = {each.get("name") for each in ports} | {each.get("containerPort") for each in ports}
        if ports and target not in known:
            yield Finding(
                "service-port",
                "error",
                document,
                ("spec", "ports", index),
                f"the pods have no port {target!r}",
                f"one of {', '.join(sorted(str(each) for each in known if each))}",
            )


def _autoscaler(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    if document.kind not in ("HorizontalPodAutoscaler", "ScaledObject"):
        return
    spec = mapping(document.content.get("spec"))
    least, most = ("minReplicas", "maxReplicas") if document.kind[0] == "H" else ("minReplicaCount", "maxReplicaCount")
    low, high = spec.get(least, 1), spec.get(most)
    if isinstance(low, int) and isinstance(high, int) and high < low:
        yield Finding(
            "autoscaler-range",
            "error",
            document,
            ("spec", most),
            f"at most {high} and at least {low}",
            f"{most} of at least {low}",
        )
    target = mapping(spec.get("scaleTargetRef"))
    kind, name = target.get("kind", "Deployment"), target.get("name")
    workloads = [other for other in documents if other.kind in (*_WORKLOADS, "LeaderWorkerSet")]
    for other in workloads:
        if (other.kind, other.name) == (kind, name) and at(other.content, "spec", "replicas") is not None:
            yield Finding(
                "autoscaler-replicas",
                "warning",
                other,
                ("spec", "replicas"),
                f"{document.name} scales it, and every apply would set it back to this number",
                "leave replicas out",
                (Change(("spec", "replicas"), REMOVE),),
            )
    if workloads and (kind, name) not in [(other.kind, other.name) for other in workloads]:
        yield Finding(
            "autoscaler-target",
            "error",
            document,
            ("spec", "scaleTargetRef"),
            f"there is no {kind}/{name} here",
            f"one of {', '.join(f'{other.kind}/{other.name}' for other in workloads)}",
        )


def _budget(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    if document.kind != "PodDisruptionBudget":
        return
    selector = mapping(at(document.content, "spec", "selector", "matchLabels"))
    chosen = _selected(selector, document, documents)
    if selector and not chosen and any(True for other in documents for _ in pods(other)):
        yield Finding(
            "budget-selector",
            "error",
            document,
            ("spec", "selector"),
            f"no pod here has {_pairs(selector)}",
            "the labels of the pods",
        )
    least = at(document.content, "spec", "minAvailable")
    for pod in chosen:
        replicas = at(pod.document.content, "spec", "replicas")
        if isinstance(least, int) and isinstance(replicas, int) and least >= replicas:
            yield Finding(
                "budget-blocks",
                "warning",
                document,
                ("spec", "minAvailable"),
                f"{least} of {replicas} pods have to stay, so no node with one can be drained",
                "maxUnavailable: 1",
                (Change(("spec", "minAvailable"), REMOVE), Change(("spec", "maxUnavailable"), 1)),
            )


def _monitor(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    services = [other for other in documents if other.kind == "Service"]
    if document.kind != "ServiceMonitor" or not services:
        return
    names = {port.get("name") for other in services for port in items(at(other.content, "spec", "ports"))}
    for index, endpoint in enumerate(items(at(document.content, "spec", "endpoints"))):
        if endpoint.get("port") is not None and endpoint["port"] not in names:
            yield Finding(
                "monitor-port",
                "error",
                document,
                ("spec", "endpoints", index, "port"),
                f"no Service here has a port named {endpoint['port']!r}, so nothing is scraped",
                f"one of {', '.join(sorted(str(name) for name in names if name))}",
            )


def _claims(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    if document.kind != "Deployment":
        return
    replicas = at(document.content, "spec", "replicas")
    scaled = any(
        other.kind in ("HorizontalPodAutoscaler", "ScaledObject")
        and at(other.content, "spec", "scaleTargetRef", "name") == document.name
        for other in documents
    )
    if not scaled and not (isinstance(replicas, int) and replicas > 1):
        return
    for pod in pods(document):
        for place, claim, mode in claims_of_one_node(pod, documents):
            yield Finding(
                "claim-mode",
                "error",
                document,
                place,
                f"{claim} is {mode}, and there are several pods: those on other nodes never start",
                "a ReadOnlyMany or ReadWriteMany claim, an image volume, or a copy for each pod",
            )


def _service_links(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    names = {other.name for other in documents if other.kind == "Service"}
    for pod in pods(document):
        if pod.spec.get("enableServiceLinks") is False or "vllm" not in names:
            continue
        if any(container.runtime == "vllm" for container in pod.containers):
            yield Finding(
                "service-links",
                "error",
                document,
                pod.path,
                "a Service named vllm makes Kubernetes set VLLM_PORT to a URL, which vLLM reads as its port and fails",
                "enableServiceLinks: false",
                (Change((*pod.path, "enableServiceLinks"), False),),
            )


RULES = (_selector, _service, _autoscaler, _budget, _monitor, _claims, _service_links)
