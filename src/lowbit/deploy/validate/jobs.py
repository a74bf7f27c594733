"""Jobs, and what restarts whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowbit.deploy.documents import Document
from lowbit.deploy.validate.finding import Change, Finding
from lowbit.deploy.validate.view import at, items, jobs, mapping, pods


def _restart(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        given, place = pod.spec.get("restartPolicy"), (*pod.path, "restartPolicy")
        # JobSet's webhook fills in what fits
        filled = document.kind == "JobSet" and given is None
        if document.kind in ("Job", "CronJob", "JobSet") and given not in ("Never", "OnFailure") and not filled:
            said = "Always, which is the default" if given is None else repr(given)
            yield Finding(
                "restart-policy",
                "error",
                document,
                place,
                f"a Job's restartPolicy cannot be {said}",
                "Never (each try is a new pod) or OnFailure",
                (Change(place, "Never"),),
            )
        if document.kind in ("Deployment", "StatefulSet", "DaemonSet") and given not in (None, "Always"):
            yield Finding(
                "restart-policy",
                "error",
                document,
                place,
                f"a {document.kind}'s restartPolicy can only be Always, not {given!r}",
                "leave it out",
                (Change(place, "Always"),),
            )


def _limits(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    asks = any(container.gpus for pod in pods(document) for container in pod.containers)
    for path, spec in jobs(document):
        if asks and spec.get("activeDeadlineSeconds") is None:
            yield Finding(
                "job-deadline",
                "warning",
                document,
                path,
                "a Job that hangs keeps its GPU for ever",
                "activeDeadlineSeconds",
                (Change((*path, "activeDeadlineSeconds"), 24 * 3600),),
            )
    own = mapping(document.content.get("spec"))
    if document.kind in ("Job", "JobSet") and asks and own.get("ttlSecondsAfterFinished") is None:
        yield Finding(
            "job-ttl",
            "warning",
            document,
            ("spec",),
            "finished Jobs and their pods stay for ever",
            "ttlSecondsAfterFinished",
            (Change(("spec", "ttlSecondsAfterFinished"), 7 * 24 * 3600),),
        )


def _failures(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    policies = {path: mapping(spec.get("podFailurePolicy")) for path, spec in jobs(document)}
    for pod in pods(document):
        path = pod.path[:-2]
        policy = policies.get(path, {})
        given = pod.spec.get("restartPolicy")
        if policy and given != "Never" and not (document.kind == "JobSet" and given is None):
            yield Finding(
                "failure-policy",
                "error",
                document,
                (*path, "podFailurePolicy"),
                "podFailurePolicy goes with restartPolicy Never only",
                "restartPolicy: Never",
                (Change((*pod.path, "restartPolicy"), "Never"),),
            )
        names = {container.name for container in pod.every_container}
        for index, rule in enumerate(items(policy.get("rules"))):
            named = at(rule, "onExitCodes", "containerName")
            if named is not None and named not in names:
                yield Finding(
                    "failure-policy",
                    "error",
                    document,
                    (*path, "podFailurePolicy", "rules", index),
                    f"there is no container {named!r}",
                    f"one of {', '.join(sorted(names))}",
                )


def _queue(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    labels = mapping(at(document.content, "metadata", "labels"))
    if (
        document.kind in ("Job", "JobSet")
        and "kueue.x-k8s.io/queue-name" in labels
        and at(document.content, "spec", "suspend") is not True
    ):
        yield Finding(
            "queue",
            "warning",
            document,
            ("spec", "suspend"),
            f"the {document.kind} starts before its queue has admitted it, where Kueue's webhook is not there",
            "suspend: true",
            (Change(("spec", "suspend"), True),),
        )


RULES = (_restart, _limits, _failures, _queue)
