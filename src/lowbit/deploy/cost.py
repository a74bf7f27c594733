"""What objects will take of a cluster: pods, GPUs, CPUs, memory, disks, before anything is applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowbit.deploy.documents import Document
from lowbit.deploy.quantity import GIB, parse_quantity
from lowbit.deploy.template import Objects
from lowbit.deploy.validate.view import Pod, at, mapping, pods


@dataclass(frozen=True)
class Cost:
    """Of one workload. least, most: pods. The rest is of one pod: GPUs, cores, bytes of memory and scratch disk (limits)."""

    name: str
    least: int
    most: int
    gpus: float
    cpu: float
    memory: float
    scratch: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def costs(contents: Objects) -> list[Cost]:
    """Of every workload."""
    found = []
    for number, content in enumerate(contents):
        document = Document(Path("-"), number, content)
        for index, pod in enumerate(pods(document)):
            least, most = _jobset(pod) if content["kind"] == "JobSet" else _replicas(content, contents)
            size = int(at(content, "spec", "leaderWorkerTemplate", "size") or 1)
            several = 1 if content["kind"] != "LeaderWorkerSet" else 1 if index == 0 else size - 1
            role = "" if content["kind"] != "LeaderWorkerSet" else (" leader", " workers")[index]
            found.append(Cost(f"{content['kind']}/{content['metadata']['name']}{role}", least * several, most * several,
                              *_pod(pod)))  # fmt: skip
    return found


def claims(contents: Objects) -> dict[str, float]:
    """Claims that are created: name -> bytes."""
    return {
        content["metadata"]["name"]: parse_quantity(at(content, "spec", "resources", "requests", "storage")) or 0.0
        for content in contents
        if content["kind"] == "PersistentVolumeClaim"
    }


def total(found: list[Cost], field: str, *, most: bool = False) -> float:
    """Sum of a field over all pods, at least or at most."""
    return float(sum(getattr(cost, field) * (cost.most if most else cost.least) for cost in found))


def _replicas(content: Mapping[str, Any], contents: Objects) -> tuple[int, int]:
    spec = mapping(content.get("spec"))
    if content["kind"] == "Job":
        several = min(int(spec.get("parallelism") or 1), int(spec.get("completions") or 1))
        return several, several
    for other in contents:
        scales = mapping(at(other, "spec", "scaleTargetRef"))
        if other["kind"] in ("HorizontalPodAutoscaler", "ScaledObject") and (
            (scales.get("kind", "Deployment"), scales.get("name")) == (content["kind"], content["metadata"]["name"])
        ):
            own = mapping(other["spec"])
            least = own.get("minReplicas", own.get("minReplicaCount", 1))
            return int(least), int(own.get("maxReplicas", own.get("maxReplicaCount", 1)))
    count = int(spec.get("replicas") or 1)
    return count, count


def _jobset(pod: Pod) -> tuple[int, int]:
    """Pods of the replicated Job that the pod's template belongs to."""
    group = mapping(at(pod.document.content, *pod.path[:3]))
    job = mapping(at(group, "template", "spec"))
    count = int(group.get("replicas", 1)) * int(job.get("parallelism", 1))
    return count, count


def _pod(pod: Pod) -> tuple[float, float, float, float]:
    """GPUs, cores, memory, scratch: of containers together; an init container that asks for more counts instead."""
    gpus = sum(container.gpus for container in pod.containers)
    sums = []
    for kind, resource in (("requests", "cpu"), ("limits", "memory"), ("limits", "ephemeral-storage")):
        amounts = [container.amount(kind, resource) or 0.0 for container in pod.containers]
        first = [c.amount(kind, resource) or 0.0 for c in pod.every_container if c.path[-2:-1] == ("initContainers",)]
        sums.append(max([sum(amounts), *first]))
    return gpus, sums[0], sums[1], sums[2]


def gib(nbytes: float) -> str:
    """For people."""
    return f"{nbytes / GIB:.0f} GiB"
