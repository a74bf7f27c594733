"""Shape: fields that are missing or unknown, names that are no names, API versions that are gone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from lowbit.deploy.documents import Document, KeyPath
from lowbit.deploy.validate.finding import REMOVE, Change, Finding
from lowbit.deploy.validate.known import CONTAINER, DEPLOYMENT, JOB, JOBSET, POD, REMOVED, REPLICATED_JOB
from lowbit.deploy.validate.view import at, items, jobs, mapping, pods

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_SERVICE = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


def _unknown(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    known = {"Deployment": DEPLOYMENT, "JobSet": JOBSET}.get(document.kind)
    if known is not None:
        yield from _check(document, ("spec",), mapping(document.content.get("spec")), known)
    for path, spec in jobs(document):
        yield from _check(document, path, spec, JOB)
        if document.kind == "JobSet":
            yield from _check(document, path[:3], mapping(at(document.content, *path[:3])), REPLICATED_JOB)
    for pod in pods(document):
        if not document.kind:
            continue
        yield from _check(document, pod.path, pod.spec, POD)
        for container in pod.every_container:
            yield from _check(document, container.path, container.content, CONTAINER)


def _check(document: Document, path: KeyPath, content: dict[str, object], known: frozenset[str]) -> Iterator[Finding]:
    for key in content:
        if key in known:
            continue
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.75)
        place = (*path, str(key))
        if near and near[0] not in content:
            changes = (Change((*path, near[0]), content[key]), Change(place, REMOVE))
            yield Finding(
                "unknown-field",
                "error",
                document,
                place,
                f"there is no field {key!r}; it would be ignored or refused",
                f"write {near[0]}",
                changes,
            )
        else:
            yield Finding(
                "unknown-field",
                "error",
                document,
                place,
                f"there is no field {key!r} here",
                "look where it belongs: kubectl explain " + document.kind.lower(),
            )


def _missing(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    if not document.kind:
        return
    if not document.content.get("apiVersion"):
        yield Finding("missing-field", "error", document, (), "it has no apiVersion", "add apiVersion")
    if not document.name and not at(document.content, "metadata", "generateName"):
        yield Finding("missing-field", "error", document, ("metadata",), "it has no name", "add metadata.name")
    needed = {
        "Deployment": ("selector", "template"),
        "StatefulSet": ("selector", "template"),
        "Job": ("template",),
        "JobSet": ("replicatedJobs",),
        "Service": ("ports",),
        "PersistentVolumeClaim": ("accessModes", "resources"),
    }
    spec = mapping(document.content.get("spec"))
    for key in needed.get(document.kind, ()):
        external = document.kind == "Service" and (
            spec.get("type") == "ExternalName" or spec.get("clusterIP") == "None"
        )
        if not spec.get(key) and not external:
            yield Finding(
                "missing-field", "error", document, ("spec", key), f"spec.{key} is missing", f"add spec.{key}"
            )
    for pod in pods(document):
        if not pod.containers:
            yield Finding("missing-field", "error", document, pod.path, "there is no container", "add containers")
        for container in pod.every_container if document.kind else ():
            for key in ("name", "image"):
                # KServe fills the image in
                if not container.content.get(key) and document.kind != "LLMInferenceService":
                    yield Finding(
                        "missing-field", "error", document, container.path, f"a container has no {key}", f"add {key}"
                    )


def _names(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    short = {"Service": _SERVICE, "Namespace": _LABEL, "LeaderWorkerSet": _LABEL}.get(document.kind, _SUBDOMAIN)
    if document.kind and document.name and short.fullmatch(document.name) is None:
        yield _name(document, ("metadata", "name"), document.name)
    for pod in pods(document):
        for container in pod.every_container:
            if container.name and _LABEL.fullmatch(container.name) is None:
                yield _name(document, (*container.path, "name"), container.name)
            for index, port in enumerate(items(container.content.get("ports"))):
                name = str(port.get("name") or "x")
                if len(name) > 15 or _LABEL.fullmatch(name) is None:
                    yield _name(document, (*container.path, "ports", index, "name"), name)
        for index, volume in enumerate(items(pod.spec.get("volumes"))):
            name = str(volume.get("name") or "")
            if _LABEL.fullmatch(name) is None:
                yield _name(document, (*pod.path, "volumes", index, "name"), name)


def _name(document: Document, path: KeyPath, name: str) -> Finding:
    made = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63]
    return Finding(
        "name",
        "error",
        document,
        path,
        f"{name!r} is no DNS label (ports: at most 15 characters)",
        f"such as {made!r}; whatever refers to it has to follow",
    )


def _versions(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    given = str(document.content.get("apiVersion"))
    newer = REMOVED.get((given, document.kind))
    if newer is not None:
        yield Finding(
            "removed-api",
            "error",
            document,
            ("apiVersion",),
            f"{document.kind} left {given} years ago",
            f"use {newer}",
            (Change(("apiVersion",), newer),),
        )


RULES = (_unknown, _missing, _names, _versions)
