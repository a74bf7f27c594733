"""apply, wait, delete against a mock API server (mock_cluster.py), through the official client and a kubeconfig."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowbit.deploy.cluster import Cluster, ClusterError, apply_all, connect, delete_all, ordered
from lowbit.deploy.cost import claims, costs, total
from lowbit.deploy.rollout import wait
from lowbit.deploy.template import objects

from .matrix import Case
from .mock_cluster import State, serving

pytest.importorskip("kubernetes")
ROOT = "/apis/apps/v1/namespaces/models/deployments/"


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def cluster(state: State, tmp_path: Path) -> Iterator[Cluster]:
    with serving(state) as url:
        kubeconfig = {
            "apiVersion": "v1", "kind": "Config", "current-context": "mock",
            "clusters": [{"name": "mock", "cluster": {"server": url}}],
            "users": [{"name": "me", "user": {"token": state.token}}],
            "contexts": [{"name": "mock", "context": {"cluster": "mock", "user": "me", "namespace": "models"}}],
        }  # fmt: skip
        (tmp_path / "config").write_text(yaml.safe_dump(kubeconfig))
        yield connect(kubeconfig=tmp_path / "config")


@pytest.fixture
def server(matrix: list[Case], state: State) -> list[dict[str, Any]]:
    """Objects of a llama.cpp server, whose Secret and claim are there."""
    case = next(c for c in matrix if "llama.cpp-q4_k_m-one-hpa" in c.name)
    contents = objects(case.templates, case.release)
    for plural, name in (
        ("secrets", f"{case.release}-api-key"),
        ("persistentvolumeclaims", "models"),
        ("secrets", "hub"),
    ):
        path = f"/api/v1/namespaces/models/{plural}/{name}"
        state.objects[path] = {"metadata": {"name": name, "resourceVersion": "1"}}
    return contents


def test_apply_is_server_side_ordered_and_repeatable(
    cluster: Cluster, state: State, server: list[dict[str, Any]]
) -> None:
    said: list[str] = []
    apply_all(cluster, server, said.append)
    assert [line.split()[0] for line in said] == ["created"] * len(server)
    assert said[0].endswith(f"ServiceAccount/{server[0]['metadata']['name']}")
    patches = [(path, query) for method, path, query in state.seen if method == "PATCH"]
    assert all(query["fieldManager"] == "lowbit" and query["fieldValidation"] == "Strict" for _, query in patches)
    assert all("/namespaces/models/" in path for path, _ in patches)
    said.clear()
    apply_all(cluster, server, said.append)
    assert {line.split()[0] for line in said} == {"unchanged"}
    deployment = next(each for each in server if each["kind"] == "Deployment")
    deployment["spec"]["revisionHistoryLimit"] = 1
    said.clear()
    apply_all(cluster, server, said.append)
    assert [line for line in said if line.startswith("configured")] == [
        f"configured Deployment/{deployment['metadata']['name']}".replace("configured ", "configured")
    ]


def test_dry_run_changes_nothing(cluster: Cluster, state: State, server: list[dict[str, Any]]) -> None:
    before = dict(state.objects)
    apply_all(cluster, server, lambda text: None, dry_run=True)
    assert state.objects == before
    assert all(query["dryRun"] == "All" for method, _, query in state.seen if method == "PATCH")


def test_missing_secret_stops_before_anything_is_changed(
    cluster: Cluster, state: State, server: list[dict[str, Any]]
) -> None:
    state.objects.clear()
    with pytest.raises(ClusterError, match="PersistentVolumeClaim models not there.*nothing was applied"):
        apply_all(cluster, server, lambda text: None)
    assert not state.objects
    assert not [method for method, _, _ in state.seen if method == "PATCH"]


def test_refusals_are_explained(cluster: Cluster, state: State, server: list[dict[str, Any]]) -> None:
    del state.kinds["monitoring.coreos.com/v1"]
    monitor = {"apiVersion": "monitoring.coreos.com/v1", "kind": "ServiceMonitor", "metadata": {"name": "x"}}
    with pytest.raises(ClusterError, match="knows no ServiceMonitor") as caught:
        apply_all(cluster, [monitor], lambda text: None)
    assert "Prometheus" in str(caught.value.hint)
    contents = [each for each in server if each["kind"] == "Deployment"]
    path = ROOT + contents[0]["metadata"]["name"]
    state.managers[path] = "argocd"
    with pytest.raises(ClusterError, match="argocd") as caught:
        apply_all(cluster, contents, lambda text: None)
    assert "--force-conflicts" in str(caught.value.hint)
    apply_all(cluster, contents, lambda text: None, force=True)
    contents[0]["spec"]["template"]["spec"]["containers"][0]["imagePolice"] = "x"
    with pytest.raises(ClusterError, match="imagePolice"):
        apply_all(cluster, contents, lambda text: None)
    state.token = "another"
    with pytest.raises(ClusterError, match="401"):
        cluster.get(contents[0])


def test_wait_until_ready(cluster: Cluster, state: State, server: list[dict[str, Any]]) -> None:
    apply_all(cluster, server, lambda text: None)
    calls = iter(range(100))

    def progress(path: str, found: dict[str, Any]) -> None:
        if "/deployments/" in path:
            step = next(calls)
            found["status"] = {"observedGeneration": min(step, 1), "updatedReplicas": 1, "replicas": 1,
                               "availableReplicas": int(step > 2)}  # fmt: skip

    state.on_get = progress
    said: list[str] = []
    wait(cluster, server, said.append, sleep=lambda seconds: None)
    assert said[-1].startswith("ready")
    assert any("0 of 1 pods available" in line for line in said)


def test_wait_for_a_jobset(cluster: Cluster, state: State) -> None:
    path = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/models/jobsets/both"
    content = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": "both"},
               "spec": {"suspend": True, "replicatedJobs": [{"name": "node", "template": {}}]}}  # fmt: skip
    apply_all(cluster, [content], lambda text: None)
    running = {"replicatedJobsStatus": [{"name": "node", "ready": 1}], "restarts": 2}
    conditions = {"conditions": [{"type": "Completed", "status": "True", "reason": "AllJobsCompleted"}]}
    steps: Iterator[dict[str, Any]] = iter([{}, running, conditions])

    def progress(where: str, found: dict[str, Any]) -> None:
        if where == path:
            found["status"] = next(steps)
            found["spec"]["suspend"] = not found["status"]

    state.on_get = progress
    said: list[str] = []
    wait(cluster, [content], said.append, sleep=lambda seconds: None)
    assert [line.partition(": ")[2] for line in said] == [
        "suspended until its queue admits it", "1 of 1 Jobs ready, 2 restarts", ""
    ]  # fmt: skip
    pod = {"name": "both-node-0-0-x", "labels": {"jobset.sigs.k8s.io/jobset-name": "both"}}
    state.objects[f"/api/v1/namespaces/models/pods/{pod['name']}"] = {"metadata": pod, "status": {
        "containerStatuses": [{"name": "quantize", "state": {"terminated": {"exitCode": 1}}}]}}  # fmt: skip
    state.logs[f"{pod['name']}/quantize"] = "error: no space left"
    failed = {"conditions": [{"type": "Failed", "status": "True", "reason": "FailedJobs"}]}
    state.on_get = lambda where, found: found.update(status=failed) if where == path else None
    with pytest.raises(ClusterError, match=r"FailedJobs[\s\S]*no space left"):
        wait(cluster, [content], lambda text: None, sleep=lambda seconds: None)


def failing(state: State, server: list[dict[str, Any]], reason: str) -> str:
    deployment = next(each for each in server if each["kind"] == "Deployment")
    labels = deployment["spec"]["selector"]["matchLabels"]
    status = {"containerStatuses": [{"name": "server", "restartCount": 2, "state": {"waiting": {"reason": reason}}}]}
    state.objects["/api/v1/namespaces/models/pods/pod-1"] = {
        "metadata": {"name": "pod-1", "labels": labels}, "status": status}  # fmt: skip
    state.objects["/api/v1/namespaces/models/events/e"] = {
        "metadata": {"name": "e"}, "type": "Warning", "involvedObject": {"name": "pod-1"}, "reason": "BackOff",
        "message": "Back-off restarting failed container"}  # fmt: skip
    state.logs["pod-1/server"] = "loading model\nerror: out of memory\n"
    return str(deployment["metadata"]["name"])


def test_failure_shows_states_events_and_logs(cluster: Cluster, state: State, server: list[dict[str, Any]]) -> None:
    apply_all(cluster, server, lambda text: None)
    failing(state, server, "CrashLoopBackOff")
    with pytest.raises(ClusterError) as caught:
        wait(cluster, server, lambda text: None, sleep=lambda seconds: None)
    for part in ("CrashLoopBackOff", "event pod-1: BackOff", "log pod-1/server: error: out of memory"):
        assert part in caught.value.message
    assert ("GET", "/api/v1/namespaces/models/pods/pod-1/log") in [(m, p) for m, p, _ in state.seen]
    assert any(query.get("previous") == "true" for _, path, query in state.seen if path.endswith("/log"))


def test_deadlines(cluster: Cluster, state: State, server: list[dict[str, Any]]) -> None:
    apply_all(cluster, server, lambda text: None)
    clock = iter(range(0, 10000, 600))
    with pytest.raises(ClusterError, match="not ready after 1800 s"):
        wait(cluster, server, lambda text: None, sleep=lambda seconds: None, clock=lambda: float(next(clock)))
    gone = {"conditions": [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded",
                            "message": "has timed out progressing"}], "observedGeneration": 1}  # fmt: skip
    state.on_get = lambda path, found: found.update(status=gone) if "/deployments/" in path else None
    with pytest.raises(ClusterError, match="timed out progressing"):
        wait(cluster, server, lambda text: None, sleep=lambda seconds: None)


def test_jobs_are_done_or_failed(cluster: Cluster, state: State, matrix: list[Case]) -> None:
    case = next(c for c in matrix if c.release == "job-0")
    contents = objects(case.templates, case.release)
    state.objects["/api/v1/namespaces/models/persistentvolumeclaims/models"] = {"metadata": {"resourceVersion": "1"}}
    state.objects[f"/api/v1/namespaces/models/persistentvolumeclaims/{case.release}"] = {
        "metadata": {"resourceVersion": "1"}
    }
    try:
        apply_all(cluster, contents, lambda text: None)
    except ClusterError as error:
        pytest.fail(error.message)
    for kind, match in (("Complete", None), ("Failed", "BackoffLimitExceeded")):
        status = {"conditions": [{"type": kind, "status": "True", "reason": "BackoffLimitExceeded"}]}
        state.on_get = lambda path, found, status=status: found.update(status=status) if "/jobs/" in path else None
        if match is None:
            wait(cluster, contents, lambda text: None, sleep=lambda seconds: None)
        else:
            with pytest.raises(ClusterError, match=match):
                wait(cluster, contents, lambda text: None, sleep=lambda seconds: None)


def test_delete_keeps_claims(cluster: Cluster, state: State, matrix: list[Case]) -> None:
    case = next(c for c in matrix if c.release == "job-0")
    contents = objects(case.templates, case.release)
    state.objects["/api/v1/namespaces/models/persistentvolumeclaims/models"] = {"metadata": {"resourceVersion": "1"}}
    apply_all(cluster, contents, lambda text: None)
    said: list[str] = []
    delete_all(cluster, contents, said.append)
    kept = [path for path in state.objects if "persistentvolumeclaims" in path]
    assert len(kept) == 2
    assert not [path for path in state.objects if "/jobs/" in path]
    delete_all(cluster, contents, said.append, with_data=True)
    assert len([path for path in state.objects if "persistentvolumeclaims" in path]) == 1
    assert any(line.startswith("not there") for line in said)


def test_no_cluster_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="no cluster is known"):
        connect(kubeconfig=tmp_path / "nothing")


def test_order_puts_needs_first(server: list[dict[str, Any]]) -> None:
    kinds = [each["kind"] for each in ordered(server)]
    assert kinds.index("ServiceAccount") < kinds.index("Deployment") < kinds.index("HorizontalPodAutoscaler")


def test_costs(matrix: list[Case]) -> None:
    case = next(c for c in matrix if "-nodes-" in c.name)
    found = costs(objects(case.templates, case.release))
    replicas = found[0].least
    assert [cost.gpus for cost in found] == [2, 2]
    assert total(found, "gpus") == 4 * replicas
    scaled = next(c for c in matrix if "-hpa-" in c.name)
    one = costs(objects(scaled.templates, scaled.release))[0]
    assert (one.least, one.most) in ((1, 4), (3, 4))
    job = next(c for c in matrix if c.release == "job-7")
    contents = objects(job.templates, job.release)
    assert total(costs(contents), "gpus") == 3
    assert claims(contents)["quantized-models"] > 2**30
    group = next(c for c in matrix if c.release == "job-12")
    both = costs(objects(group.templates, group.release))
    assert [(cost.least, cost.most, cost.gpus) for cost in both] == [(2, 2, 8)]
    assert total(both, "gpus") == 16
