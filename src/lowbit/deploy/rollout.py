"""Waiting for what was applied, and why it does not get ready: states, events, the ends of logs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from lowbit.deploy.cluster import Cluster, ClusterError, Say
from lowbit.deploy.template import Objects

_WAITED = ("Deployment", "Job", "JobSet", "LeaderWorkerSet", "LLMInferenceService")
# of these no pod recovers without a person
_HOPELESS = (
    "ImagePullBackOff",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CrashLoopBackOff",
    "RunContainerError",
)


def wait(
    cluster: Cluster, contents: Objects, say: Say, *, timeout: float = 1800, every: float = 2.0,
    sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Until all workloads are ready (Jobs: done), at most `timeout` seconds. Raises ClusterError that tells what the pods,
    the events and the logs say."""
    until = clock() + timeout
    for content in contents:
        if content["kind"] not in _WAITED:
            continue
        what, told = f"{content['kind']}/{content['metadata']['name']}", ""
        while True:
            state, reason = _state(cluster.get(content) or {})
            if state == "ready":
                say(f"ready     {what}")
                break
            if reason != told:
                say(f"waiting   {what}: {reason}")
                told = reason
            hopeless = "" if state == "failed" else _hopeless(cluster, content)
            if state == "failed" or hopeless:
                raise _failure(cluster, content, f"{what} failed: {hopeless or reason}")
            if clock() >= until:
                raise _failure(cluster, content, f"{what} is not ready after {timeout:.0f} s: {reason}")
            sleep(every)


def _state(found: Mapping[str, Any]) -> tuple[str, str]:
    """ "ready", "failed" or "waiting", and a reason."""
    status, spec = found.get("status") or {}, found.get("spec") or {}
    conditions = {each["type"]: each for each in status.get("conditions") or ()}
    if found.get("kind") == "Job":
        return _job(spec, status, conditions)
    if found.get("kind") == "JobSet":
        return _jobset(spec, status, conditions)
    if found.get("kind") != "Deployment":
        ready = conditions.get("Available") or conditions.get("Ready") or {}
        return ("ready" if ready.get("status") == "True" else "waiting"), str(
            ready.get("message") or "no condition yet"
        )
    generation = (found.get("metadata") or {}).get("generation", 0)
    if status.get("observedGeneration", 0) < generation:
        return "waiting", "not seen by the controller yet"
    progress = conditions.get("Progressing") or {}
    if progress.get("reason") == "ProgressDeadlineExceeded":
        return "failed", str(progress.get("message") or "the deadline of its progress has passed")
    wanted = spec.get("replicas", 1)
    updated, available, every = (status.get(key, 0) for key in ("updatedReplicas", "availableReplicas", "replicas"))
    done = updated >= wanted and every <= updated and available >= wanted
    return ("ready" if done else "waiting"), f"{available} of {wanted} pods available, {updated} of the new kind"


def _job(spec: Mapping[str, Any], status: Mapping[str, Any], conditions: Mapping[str, Any]) -> tuple[str, str]:
    for kind, state in (("Complete", "ready"), ("Failed", "failed")):
        if (conditions.get(kind) or {}).get("status") == "True":
            return state, f"{conditions[kind].get('reason', '')} {conditions[kind].get('message', '')}".strip()
    if spec.get("suspend"):
        return "waiting", "suspended until its queue admits it"
    return (
        "waiting",
        f"{status.get('succeeded', 0)} of {spec.get('completions', 1)} done, {status.get('active', 0)} running",
    )


def _jobset(spec: Mapping[str, Any], status: Mapping[str, Any], conditions: Mapping[str, Any]) -> tuple[str, str]:
    for kind, state in (("Completed", "ready"), ("Failed", "failed")):
        if (conditions.get(kind) or {}).get("status") == "True":
            return state, f"{conditions[kind].get('reason', '')} {conditions[kind].get('message', '')}".strip()
    if spec.get("suspend"):
        return "waiting", "suspended until its queue admits it"
    ready = sum(each.get("ready", 0) for each in status.get("replicatedJobsStatus") or ())
    return (
        "waiting",
        f"{ready} of {len(spec.get('replicatedJobs') or ())} Jobs ready, {status.get('restarts', 0)} restarts",
    )


def _pods(cluster: Cluster, content: Mapping[str, Any]) -> Objects:
    labels = (content["metadata"].get("labels") or {}).items()
    chosen = [
        f"{key}={value}" for key, value in labels if key in ("app.kubernetes.io/name", "app.kubernetes.io/instance")
    ]
    own = content.get("spec", {}).get("selector", {}).get("matchLabels", {})
    selector = ",".join(f"{key}={value}" for key, value in own.items()) or ",".join(chosen)
    if content["kind"] == "Job":
        selector = f"batch.kubernetes.io/job-name={content['metadata']['name']}"
    if content["kind"] == "JobSet":
        selector = f"jobset.sigs.k8s.io/jobset-name={content['metadata']['name']}"
    return cluster.items("pods", cluster.namespace_of(content), labelSelector=selector)


def _hopeless(cluster: Cluster, content: Mapping[str, Any]) -> str:
    for pod in _pods(cluster, content):
        for name, state in _containers(pod):
            waiting = (state.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in _HOPELESS:
                return f"{name} of {pod['metadata']['name']}: {waiting['reason']} {waiting.get('message', '')}".strip()
    return ""


def _containers(pod: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    status = pod.get("status") or {}
    every = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    return [(str(each["name"]), each) for each in every]


def _failure(cluster: Cluster, content: Mapping[str, Any], message: str) -> ClusterError:
    """With events of the object and its pods, and the last lines of their logs."""
    namespace, lines = cluster.namespace_of(content), [message]
    pods = _pods(cluster, content)
    names = {content["metadata"]["name"], *(pod["metadata"]["name"] for pod in pods)}
    for event in cluster.items("events", namespace):
        if (event.get("involvedObject") or {}).get("name") in names and event.get("type") != "Normal":
            lines.append(f"event {event['involvedObject']['name']}: {event.get('reason')}: {event.get('message')}")
    for pod in pods[:3]:
        for name, state in _containers(pod):
            restarted = int(state.get("restartCount") or 0) > 0
            log = cluster.log(pod["metadata"]["name"], name, namespace, previous=restarted)
            lines += [f"log {pod['metadata']['name']}/{name}: {line}" for line in log.splitlines()]
    return ClusterError("\n".join(lines), hint=f"kubectl -n {namespace} describe {content['kind'].lower()} "
                        f"{content['metadata']['name']}")  # fmt: skip
