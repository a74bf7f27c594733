"""Shape: fields that are missing, unknown or mistyped, names that are no names, API versions that are gone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from lowbit.deploy.documents import Document, KeyPath
from lowbit.deploy.validate.finding import REMOVE, Change, Finding
from lowbit.deploy.validate.view import at, items, mapping, pods

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_SERVICE = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_REMOVED = {
    ("extensions/v1beta1", "Deployment"): "apps/v1",
    ("apps/v1beta1", "Deployment"): "apps/v1",
    ("apps/v1beta2", "Deployment"): "apps/v1",
    ("extensions/v1beta1", "Ingress"): "networking.k8s.io/v1",
    ("networking.k8s.io/v1beta1", "Ingress"): "networking.k8s.io/v1",
    ("batch/v1beta1", "CronJob"): "batch/v1",
    ("policy/v1beta1", "PodDisruptionBudget"): "policy/v1",
    ("autoscaling/v2beta1", "HorizontalPodAutoscaler"): "autoscaling/v2",
    ("autoscaling/v2beta2", "HorizontalPodAutoscaler"): "autoscaling/v2",
}
_CONTAINER = frozenset(
    [
        "name",
        "image",
        "imagePullPolicy",
        "command",
        "args",
        "workingDir",
        "env",
        "envFrom",
        "ports",
        "resources",
        "resizePolicy",
        "restartPolicy",
        "restartPolicyRules",
        "volumeMounts",
        "volumeDevices",
        "livenessProbe",
        "readinessProbe",
        "startupProbe",
        "lifecycle",
        "terminationMessagePath",
        "terminationMessagePolicy",
        "securityContext",
        "stdin",
        "stdinOnce",
        "tty",
    ]
)
_POD = frozenset(
    [
        "containers",
        "initContainers",
        "ephemeralContainers",
        "volumes",
        "restartPolicy",
        "terminationGracePeriodSeconds",
        "activeDeadlineSeconds",
        "dnsPolicy",
        "dnsConfig",
        "nodeSelector",
        "nodeName",
        "serviceAccountName",
        "serviceAccount",
        "automountServiceAccountToken",
        "hostNetwork",
        "hostPID",
        "hostIPC",
        "hostUsers",
        "hostname",
        "hostnameOverride",
        "subdomain",
        "shareProcessNamespace",
        "securityContext",
        "imagePullSecrets",
        "affinity",
        "schedulerName",
        "tolerations",
        "hostAliases",
        "priorityClassName",
        "priority",
        "preemptionPolicy",
        "overhead",
        "readinessGates",
        "runtimeClassName",
        "enableServiceLinks",
        "setHostnameAsFQDN",
        "topologySpreadConstraints",
        "os",
        "schedulingGates",
        "resourceClaims",
        "resources",
        "workloadRef",
        "schedulingGroup",
    ]
)
_DEPLOYMENT = frozenset(
    [
        "replicas",
        "selector",
        "template",
        "strategy",
        "minReadySeconds",
        "revisionHistoryLimit",
        "paused",
        "progressDeadlineSeconds",
    ]
)
_JOB = frozenset(
    [
        "template",
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "podFailurePolicy",
        "successPolicy",
        "backoffLimit",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
        "selector",
        "manualSelector",
        "ttlSecondsAfterFinished",
        "completionMode",
        "suspend",
        "podReplacementPolicy",
        "managedBy",
        "scheduling",
    ]
)


def _unknown(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    known = {"Deployment": _DEPLOYMENT, "Job": _JOB}.get(document.kind)
    if known is not None:
        yield from _check(document, ("spec",), mapping(document.content.get("spec")), known)
    for pod in pods(document):
        if not document.kind:
            continue
        yield from _check(document, pod.path, pod.spec, _POD)
        for container in pod.every_container:
            yield from _check(document, container.path, container.content, _CONTAINER)


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


def _types(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for key in ("replicas", "backoffLimit", "completions", "parallelism", "progressDeadlineSeconds"):
        value = at(document.content, "spec", key)
        if isinstance(value, str):
            fix = (Change(("spec", key), int(value)),) if value.isdigit() else ()
            yield Finding(
                "wrong-type",
                "error",
                document,
                ("spec", key),
                f"{key} is the text {value!r}, not a number",
                "write it without quotes",
                fix,
            )
    for pod in pods(document):
        for container in pod.every_container:
            for key in ("command", "args"):
                given = container.content.get(key)
                if isinstance(given, str):
                    yield Finding(
                        "wrong-type",
                        "error",
                        document,
                        (*container.path, key),
                        f"{key} is one text, not a list",
                        "write one item for each word",
                        (Change((*container.path, key), given.split()),),
                    )
                for index, word in enumerate(given if isinstance(given, list) else ()):
                    if not isinstance(word, str):
                        place = (*container.path, key, index)
                        yield Finding(
                            "wrong-type",
                            "error",
                            document,
                            place,
                            f"{word!r} is no text",
                            "quote it",
                            (Change(place, _text(word)),),
                        )
            for index, entry in enumerate(items(container.content.get("env"))):
                value = entry.get("value")
                if value is not None and not isinstance(value, str):
                    place = (*container.path, "env", index, "value")
                    yield Finding(
                        "wrong-type",
                        "error",
                        document,
                        place,
                        f"{entry.get('name')} is {value!r}, and variables are text",
                        "quote it",
                        (Change(place, _text(value)),),
                    )
            for index, port in enumerate(items(container.content.get("ports"))):
                if isinstance(port.get("containerPort"), str):
                    place = (*container.path, "ports", index, "containerPort")
                    fix = (Change(place, int(port["containerPort"])),) if port["containerPort"].isdigit() else ()
                    yield Finding(
                        "wrong-type",
                        "error",
                        document,
                        place,
                        "containerPort is a text, not a number",
                        "write it without quotes",
                        fix,
                    )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    newer = _REMOVED.get((given, document.kind))
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


RULES = (_unknown, _missing, _types, _names, _versions)
