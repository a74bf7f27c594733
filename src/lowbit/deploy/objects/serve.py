"""A model server: Deployment (or LeaderWorkerSet, or KServe's LLMInferenceService) and all that belongs to it."""

from __future__ import annotations

import math

from lowbit.deploy.objects import pod
from lowbit.deploy.objects.network import network_policy, route
from lowbit.deploy.objects.scaling import autoscaler, disruption_budget, service_monitor
from lowbit.deploy.spec import ServeSpec
from lowbit.deploy.template import Release, Template, Tree, Value, When

COMPONENT = "server"
# seconds that endpoints take to forget a pod which is ending
_FORGET = 10
_PULL_IMAGE = 900
_READ_RATE = 100e6  # bytes a second of a slow network volume


def serve_templates(spec: ServeSpec) -> list[Template]:
    """Every object of a server, in the order that they are applied."""
    templates = [Template("serviceaccount.yaml", _service_account())]
    if spec.kserve:
        return [*templates, Template("llminferenceservice.yaml", _inference_service(spec)),
                Template("networkpolicy.yaml", network_policy(spec), ("networkPolicy.enabled", True))]  # fmt: skip
    workload = _leader_worker_set(spec) if spec.nodes > 1 else _deployment(spec)
    templates += [
        Template("leaderworkerset.yaml" if spec.nodes > 1 else "deployment.yaml", workload),
        Template("service.yaml", _service(spec)),
        Template("networkpolicy.yaml", network_policy(spec), ("networkPolicy.enabled", True)),
        Template("poddisruptionbudget.yaml", disruption_budget(spec), ("podDisruptionBudget.enabled", True)),
    ]
    if spec.autoscale != "none":
        templates.append(Template("autoscaler.yaml", autoscaler(spec), ("autoscaling.enabled", True)))
    if spec.metrics_path:
        templates.append(
            Template("servicemonitor.yaml", service_monitor(spec), ("monitoring.enabled", spec.monitoring))
        )
    if spec.route != "none":
        templates.append(Template(f"{spec.route}.yaml", route(spec)))
    return templates


# what a small cluster without monitoring has: the overlay "dev", and the chart's values-dev.yaml
DEV_VALUES = {
    "replicas": 1,
    "autoscaling.enabled": False,
    "podDisruptionBudget.enabled": False,
    "monitoring.enabled": False,
}


def load_seconds(spec: ServeSpec) -> int:
    """How long a pod may take from its start until it answers."""
    return max(60, math.ceil(spec.weight_bytes / _READ_RATE) + spec.warmup)


def _service_account() -> Tree:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": pod.metadata(COMPONENT),
            "automountServiceAccountToken": False}  # fmt: skip


def _service(spec: ServeSpec) -> Tree:
    leader = {"leaderworkerset.sigs.k8s.io/worker-index": "0"} if spec.nodes > 1 else {}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": pod.metadata(COMPONENT),
        "spec": {
            "type": "ClusterIP",
            "selector": {**pod.selector(COMPONENT), **leader},
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def _deployment(spec: ServeSpec) -> Tree:
    replicas: Tree = Value("replicas", spec.replicas, "Pods.")
    if spec.autoscale != "none":
        replicas = When("autoscaling.enabled", True, replicas, negate=True)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": pod.metadata(COMPONENT),
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": 5,
            # above what pulling the image and loading the model may take, or a rollout is given up while it goes well
            "progressDeadlineSeconds": _PULL_IMAGE + load_seconds(spec) + 120,
            "selector": {"matchLabels": pod.selector(COMPONENT)},
            # a GPU that is held by the old pod is not there for a new one
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 0 if spec.gpus else 1, "maxUnavailable": 1 if spec.gpus else 0},
            },
            "template": {"metadata": _pod_metadata(), "spec": _pod(spec, _container(spec))},
        },
    }


def _leader_worker_set(spec: ServeSpec) -> Tree:
    """vLLM's own way over nodes, without Ray: the leader serves, the workers have no head."""
    nodes = ["--nnodes", str(spec.nodes), "--master-addr", "$(LWS_LEADER_ADDRESS)"]
    leader = _container(spec, [*nodes, "--node-rank", "0"])
    worker = _container(spec, [*nodes, "--node-rank", "$(LWS_WORKER_INDEX)", "--headless"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe", "ports"):
        worker.pop(probe)
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": pod.metadata(COMPONENT),
        "spec": {
            "replicas": Value("replicas", spec.replicas, "Groups of pods."),
            "startupPolicy": "LeaderCreated",
            "leaderWorkerTemplate": {
                "size": spec.nodes,
                # a group has one state: with one pod gone the others hang
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": {"metadata": _pod_metadata(), "spec": _pod(spec, leader)},
                "workerTemplate": {"metadata": _pod_metadata(), "spec": _pod(spec, worker)},
            },
        },
    }


def _inference_service(spec: ServeSpec) -> Tree:
    """KServe loads the model, routes and schedules; the container is ours."""
    source = spec.source
    uri = {"claim": f"pvc://{source.ref}", "image": f"oci://{source.ref}", "pull": f"hf://{source.ref}"}[source.kind]
    uri += f":{source.revision}" if source.revision else f"/{source.path}" if source.path else ""
    container = _container(spec)
    container["name"] = "main"
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "models"]
    body = _pod(spec, container)
    body["volumes"] = [volume for volume in body["volumes"] if volume["name"] != "models"]
    body.pop("initContainers", None)
    return {
        "apiVersion": "serving.kserve.io/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": pod.metadata(COMPONENT),
        "spec": {
            "model": {"uri": Value("model.uri", uri, "pvc://, oci:// or hf://"), "name": spec.model},
            "replicas": Value("replicas", spec.replicas, "Pods."),
            "router": {"gateway": {}, "route": {}, "scheduler": {}},
            "template": body,
        },
    }


def _pod_metadata() -> Tree:
    return {"labels": {**pod.selector(COMPONENT), "app.kubernetes.io/component": COMPONENT},
            "annotations": Value("podAnnotations", {}, "Of the pods.")}  # fmt: skip


def _pod(spec: ServeSpec, container: dict[str, Tree]) -> dict[str, Tree]:
    volumes = [pod.model_volume(spec.source, spec.weight_bytes), *pod.scratch_volumes(spec)]
    if spec.shm:
        volumes.append(pod.shm_volume(spec.shm))
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": pod.selector(COMPONENT)},
    }
    body: dict[str, Tree] = {
        "serviceAccountName": Release(),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # VLLM_PORT from a Service called vllm would be read as a setting
        "securityContext": pod.pod_security(),
        "terminationGracePeriodSeconds": _FORGET + spec.drain + 15,
        **pod.placement(spec),
        "topologySpreadConstraints": [spread],
        "containers": [container],
        "volumes": volumes,
    }
    if spec.source.kind == "pull":
        body["initContainers"] = [_puller(spec)]
    return body


def _container(spec: ServeSpec, more: list[str] | None = None) -> dict[str, Tree]:
    mounts = [{"name": "models", "mountPath": pod.MODELS, "readOnly": True}, *pod.scratch_mounts()]
    if spec.shm:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    health = {"httpGet": {"path": spec.health_path, "port": "http"}}
    command = {"command": list(spec.command)} if spec.command else {}
    return {
        "name": COMPONENT,
        "image": pod.image(spec.image),
        "imagePullPolicy": pod.always_pull(),
        **command,
        "args": [*_arguments(spec), *(more or [])],
        "env": [*_variables(spec), *_key(spec)],
        "ports": [{"name": "http", "containerPort": spec.port, "protocol": "TCP"}],
        "resources": pod.resources(spec),
        "startupProbe": {**health, "periodSeconds": 10, "timeoutSeconds": 5,
                         "failureThreshold": math.ceil(load_seconds(spec) / 10)},
        "readinessProbe": {**health, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
        "livenessProbe": {**health, "periodSeconds": 20, "timeoutSeconds": 15, "failureThreshold": 6},
        # until every endpoint has forgotten the pod, it goes on answering
        "lifecycle": {"preStop": {"sleep": {"seconds": _FORGET}}},
        "securityContext": pod.container_security(),
        "volumeMounts": mounts,
    }  # fmt: skip


def _arguments(spec: ServeSpec) -> list[Tree]:
    """The runtime's arguments; a number of threads is the knob of the CPUs."""
    cores = Value("resources.cpu", str(spec.cpu), "Cores.")
    follow = [spec.threads and index > 0 and spec.args[index - 1] == "--threads" for index in range(len(spec.args))]
    return [cores if linked else word for word, linked in zip(spec.args, follow, strict=True)]


def _variables(spec: ServeSpec) -> list[Tree]:
    cores = Value("resources.cpu", str(spec.cpu), "Cores.")
    listed = pod.environment(spec)
    return [{**entry, "value": cores} if spec.threads and entry["name"] == "OMP_NUM_THREADS" else entry
            for entry in listed]  # fmt: skip


def _key(spec: ServeSpec) -> list[Tree]:
    if not (spec.api_key_variable and spec.api_key_secret):
        return []
    reference = {"name": Value("apiKey.secret", spec.api_key_secret, "Secret with the key api-key."), "key": "api-key"}
    return [{"name": spec.api_key_variable, "valueFrom": {"secretKeyRef": reference}}]


def _puller(spec: ServeSpec) -> Tree:
    """Downloads the model into the pod. Each restart of a pod downloads again; a claim or an image volume does not."""
    assert spec.puller is not None
    single = spec.location.endswith(".gguf")
    folder, _, file = spec.location.rpartition("/")
    words = ["download", Value("model.repository", spec.source.ref, "Hub id."), *([file] if single else [])]
    if spec.source.revision:
        words += ["--revision", Value("model.revision", spec.source.revision, "Commit of the hub id.")]
    return {
        "name": "pull",
        "image": pod.image(spec.puller, "puller"),
        "imagePullPolicy": pod.always_pull(),
        "command": ["hf"],
        "args": [*words, "--local-dir", folder if single else spec.location],
        "env": [{"name": "HOME", "value": pod.HOME}, {"name": "TMPDIR", "value": "/tmp"}, *pod.token(spec)],
        "resources": {
            "requests": {"cpu": "1", "memory": "2Gi"},
            "limits": {"cpu": "4", "memory": "2Gi"},
        },
        "securityContext": pod.container_security(),
        "volumeMounts": [{"name": "models", "mountPath": pod.MODELS}, *pod.scratch_mounts()],
    }
