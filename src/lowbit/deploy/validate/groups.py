"""Pods and processes that work as one: JobSets, Indexed Jobs, torchrun.

Sources: kubernetes-sigs/jobset, jobset_types.go (host names, restarts) and its webhook (lengths of names); PyTorch,
torch/distributed/run.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from lowbit.deploy.documents import Document, KeyPath
from lowbit.deploy.validate.finding import Change, Finding
from lowbit.deploy.validate.view import Container, at, claims_of_one_node, items, jobs, mapping, pods

_LOOPBACK = ("localhost", "127.0.0.1", "::1", "")


def _names(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    """The webhook refuses a JobSet whose pods' names would be too long."""
    for path, spec in jobs(document) if document.kind == "JobSet" else ():
        group = mapping(at(document.content, *path[:3]))
        last = [_number(group.get("replicas"), 1) - 1, _number(spec.get("completions"), 1) - 1]
        pod = f"{document.name}-{group.get('name', '')}-{last[0]}-{last[1]}-abcde"
        if len(pod) > 63:
            yield Finding(
                "name",
                "error",
                document,
                ("metadata", "name"),
                f"pods would be called {pod!r}, which has {len(pod)} characters of at most 63",
                "a shorter name of the JobSet, or of its replicated Job",
            )


def _claims(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    at_once = {path: _at_once(document, path) for path, _ in jobs(document)}
    for pod in pods(document):
        if at_once.get(pod.path[:-2], 1) < 2:
            continue
        for place, claim, mode in claims_of_one_node(pod, documents):
            yield Finding(
                "claim-mode",
                "error",
                document,
                place,
                f"{claim} is {mode}, and several pods run at once: those on other nodes never start",
                "a ReadWriteMany claim",
            )


def _torchrun(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    specs = dict(jobs(document))
    for pod in pods(document):
        path = pod.path[:-2]
        for container in pod.containers:
            if re.search(r"\btorchrun\b|torch\.distributed\.run\b", container.line) is None:
                continue
            nodes = _nodes(container)
            yield from _processes(container, container.flag("--nproc-per-node"), "--nproc-per-node")
            if path not in specs or nodes < 2:
                continue
            several = _at_once(document, path)
            if nodes != several:
                yield Finding(
                    "torchrun-nodes",
                    "error",
                    document,
                    container.place("--nnodes"),
                    f"torchrun waits for {nodes} pods, and {several} run at once",
                    f"--nnodes {several}, or parallelism and completions of {nodes}",
                )
            yield from _rendezvous(container, document, documents, path)
            yield from _restarts(container, document, path, specs[path])


def _lowbit(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        for container in pod.containers:
            if re.search(r"\blowbit\b", container.line) and "--gpus" in container.flags:
                yield from _processes(container, container.flag("--gpus"), "--gpus")


def _processes(container: Container, given: str | None, flag: str) -> Iterator[Finding]:
    """One process a GPU, and /dev/shm between them."""
    document, count = container.document, _number(given, 0)
    if count and container.gpus and count != container.gpus:
        yield Finding(
            "gpu-processes",
            "error" if count > container.gpus else "warning",
            document,
            container.place(flag),
            f"{count} processes on {container.gpus:g} GPUs",
            f"{flag} {container.gpus:g}",
        )
    shared = [mount for mount in container.mounts if mount.get("mountPath") == "/dev/shm"]
    if count > 1 and container.gpus and not shared:
        yield Finding(
            "no-shm",
            "error",
            document,
            (*container.path, "volumeMounts"),
            f"{count} processes exchange tensors through /dev/shm, which has 64 MiB in a container",
            "an emptyDir with medium: Memory and a sizeLimit at /dev/shm",
        )


def _rendezvous(
    container: Container, document: Document, documents: Sequence[Document], path: KeyPath
) -> Iterator[Finding]:
    flag = next((name for name in ("--rdzv-endpoint", "--master-addr") if name in container.flags), "")
    host = re.sub(r":\d+$", "", container.flag(flag) or "") if flag else ""
    place = container.place(flag) if flag else container.path
    if "--standalone" in container.flags or host in _LOOPBACK:
        yield Finding(
            "rendezvous",
            "error",
            document,
            place,
            "every pod would wait for the others at its own loopback address",
            "--master-addr with the host name of the first pod",
        )
        return
    if "$" in host:
        return
    first, _, rest = host.partition(".")
    if document.kind == "JobSet":
        yield from _jobset_host(document, place, first, rest.partition(".")[0])
        return
    subdomain = container.pod.spec.get("subdomain")
    ours = re.fullmatch(rf"{re.escape(document.name)}-\d+", first) is not None
    if ours and (not subdomain or rest.partition(".")[0] != subdomain):
        yield Finding(
            "rendezvous",
            "error",
            document,
            place,
            f"{host} has no address: the pods' subdomain is {subdomain or 'not set'}",
            "subdomain in the pod's template, and a headless Service of that name; or a JobSet, which makes both",
        )
    elif ours and not any(
        each.kind == "Service" and each.name == subdomain and at(each.content, "spec", "clusterIP") == "None"
        for each in documents
    ):
        yield Finding(
            "rendezvous",
            "warning",
            document,
            place,
            f"no headless Service {subdomain} is here, without which {host} has no address",
            f"a Service {subdomain} with clusterIP: None that selects the pods; or a JobSet, which makes it",
        )


def _jobset_host(document: Document, place: KeyPath, first: str, subdomain: str) -> Iterator[Finding]:
    network = mapping(at(document.content, "spec", "network"))
    expected = network.get("subdomain") or document.name
    hosts = [
        f"{document.name}-{group.get('name')}-0-0"
        for group in items(at(document.content, "spec", "replicatedJobs"))
    ]  # fmt: skip
    if network.get("enableDNSHostnames") is False:
        yield Finding(
            "rendezvous",
            "error",
            document,
            ("spec", "network", "enableDNSHostnames"),
            "the pods have no host names to meet at",
            "enableDNSHostnames: true",
            (Change(("spec", "network", "enableDNSHostnames"), True),),
        )
    elif subdomain != expected or (first.endswith("-0-0") and first not in hosts):
        yield Finding(
            "rendezvous",
            "error",
            document,
            place,
            f"no pod here is called {'.'.join(filter(None, (first, subdomain)))}",
            " or ".join(f"{host}.{expected}" for host in hosts),
        )
    elif network.get("publishNotReadyAddresses") is False and any(
        container.content.get("readinessProbe") for pod in pods(document) for container in pod.containers
    ):
        yield Finding(
            "rendezvous",
            "error",
            document,
            ("spec", "network", "publishNotReadyAddresses"),
            "pods get no address before they are ready, and get ready only when they have met",
            "publishNotReadyAddresses: true",
            (Change(("spec", "network", "publishNotReadyAddresses"), True),),
        )


def _restarts(container: Container, document: Document, path: KeyPath, spec: dict[str, Any]) -> Iterator[Finding]:
    if document.kind == "Job" and spec.get("completionMode") != "Indexed" and "JOB_COMPLETION_INDEX" in container.line:
        yield Finding(
            "torchrun-rank",
            "error",
            document,
            (*path, "completionMode"),
            "JOB_COMPLETION_INDEX is set in Indexed Jobs only",
            "completionMode: Indexed",
            (Change((*path, "completionMode"), "Indexed"),),
        )
    if document.kind == "JobSet" and spec.get("backoffLimit") != 0:
        yield Finding(
            "group-restart",
            "warning",
            document,
            (*path, "backoffLimit"),
            "a pod that fails is replaced alone, while the others hang in an exchange with the lost one",
            "backoffLimit: 0, and failurePolicy.maxRestarts of the JobSet",
            (Change((*path, "backoffLimit"), 0),),
        )


def _nodes(container: Container) -> int:
    """Pods that torchrun waits for; 1 where it is elastic, or every pod is on its own."""
    low, _, high = (container.flag("--nnodes") or "1").partition(":")
    return int(low) if low.isdigit() and high in ("", low) else 1


def _at_once(document: Document, path: KeyPath) -> int:
    """Pods of a Job that run at once; of a JobSet, of all its Jobs alike."""
    spec = mapping(at(document.content, *path))
    replicas = _number(at(document.content, *path[:3], "replicas"), 1) if document.kind == "JobSet" else 1
    most = _number(spec.get("parallelism"), 1)
    return replicas * min(most, _number(spec.get("completions"), most))


def _number(value: object, default: int) -> int:
    return int(str(value)) if str(value).isdigit() else default


RULES = (_names, _claims, _torchrun, _lowbit)
