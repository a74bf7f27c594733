"""How many pods there are, how few there may be, and what is watched."""

from __future__ import annotations

from lowbit.deploy.objects import pod
from lowbit.deploy.objects.metrics import query
from lowbit.deploy.spec import ServeSpec
from lowbit.deploy.template import Release, Tree, Value

_MOST = "Pods at most."


def autoscaler(spec: ServeSpec) -> Tree:
    """A HorizontalPodAutoscaler on the runtime's queue (by prometheus-adapter) or on CPUs, or KEDA's ScaledObject."""
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": Release()}
    least = Value("replicas", spec.replicas, "Pods.")
    most = Value("autoscaling.max", spec.max_replicas, _MOST)
    if spec.autoscale == "keda":
        return _scaled_object(spec, least, most)
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": pod.metadata("server"),
        "spec": {
            "scaleTargetRef": target,
            "minReplicas": least,
            "maxReplicas": most,
            "metrics": [_metric(spec)],
            # a pod that took minutes to load is not thrown away for a quiet minute
            "behavior": {
                "scaleUp": {"stabilizationWindowSeconds": 30, "policies": [_policy(2, 60)]},
                "scaleDown": {"stabilizationWindowSeconds": 600, "policies": [_policy(1, 120)]},
            },
        },
    }


def _policy(pods: int, seconds: int) -> Tree:
    return {"type": "Pods", "value": pods, "periodSeconds": seconds}


def _metric(spec: ServeSpec) -> Tree:
    if spec.metric is None:
        used = Value("autoscaling.cpu", 70, "Percent of the CPU request.")
        return {"type": "Resource",
                "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": used}}}  # fmt: skip
    threshold = Value("autoscaling.threshold", f"{spec.metric.threshold:g}", "Of the metric, for each pod.")
    target = {"type": "AverageValue", "averageValue": threshold}
    return {"type": "Pods", "pods": {"metric": {"name": spec.metric.name}, "target": target}}


def _scaled_object(spec: ServeSpec, least: Value, most: Value) -> Tree:
    assert spec.metric is not None
    trigger = {
        "type": "prometheus",
        "metadata": {
            "serverAddress": Value("autoscaling.prometheus", spec.prometheus, "Address of Prometheus."),
            "query": query(spec.metric.name),
            "threshold": Value("autoscaling.threshold", f"{spec.metric.threshold:g}", "Of the metric, for each pod."),
        },
    }
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": pod.metadata("server"),
        "spec": {
            "scaleTargetRef": {"name": Release()},
            "minReplicaCount": least,
            "maxReplicaCount": most,
            "pollingInterval": 15,
            "cooldownPeriod": 600,
            "triggers": [trigger],
        },
    }


def disruption_budget(spec: ServeSpec) -> Tree:
    """One pod at a time may be taken by maintenance; a single one too, or its node could never be drained."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": pod.metadata("server"),
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": pod.selector("server")},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }


def service_monitor(spec: ServeSpec) -> Tree:
    """For the Prometheus operator; with the key where the runtime asks for it."""
    endpoint: dict[str, Tree] = {"port": "http", "path": spec.metrics_path, "interval": "15s"}
    if spec.metrics_key and spec.api_key_secret:
        secret = Value("apiKey.secret", spec.api_key_secret, "Secret with the key api-key.")
        endpoint["authorization"] = {"type": "Bearer", "credentials": {"name": secret, "key": "api-key"}}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": pod.metadata("server"),
        "spec": {"selector": {"matchLabels": pod.selector("server")}, "endpoints": [endpoint]},
    }
