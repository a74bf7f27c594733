"""Who may talk to a server, and how it is reached from outside."""

from __future__ import annotations

from lowbit.deploy.objects import pod
from lowbit.deploy.spec import QuantizeSpec, ServeSpec
from lowbit.deploy.template import Release, Tree, Value, When

_DNS = {
    "to": [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}},
        {"ipBlock": {"cidr": "169.254.20.10/32"}},  # NodeLocal DNSCache
    ],
    "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}],
}
_HTTPS = {"ports": [{"port": 443, "protocol": "TCP"}]}


def network_policy(spec: ServeSpec) -> Tree:
    """In: the own namespace, monitoring (vLLM's /metrics asks for no key) and the gateway. Out: names, and the hub only for
    a puller. Pods of one group talk to one another freely."""
    port = [{"port": spec.port, "protocol": "TCP"}]
    allowed: list[Tree] = [
        {"from": [{"podSelector": {}}], "ports": port},
        When(
            "monitoring.enabled",
            spec.monitoring,
            {"from": [_namespace(Value("monitoring.namespace", spec.monitoring_namespace, "Of Prometheus."))],
             "ports": port},
        ),
    ]  # fmt: skip
    if not spec.metrics_path or spec.kserve:
        allowed.pop()
    if spec.route != "none" or spec.kserve:
        allowed.append({"from": [_namespace(Value("route.namespace", spec.gateway_namespace, "Of the controller."))],
                        "ports": port})  # fmt: skip
    out: list[Tree] = [_DNS, *([_HTTPS] if spec.source.kind == "pull" else [])]
    if spec.nodes > 1:
        group = [{"podSelector": {"matchLabels": pod.selector("server")}}]
        allowed.append({"from": group})
        out.append({"to": group})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": pod.metadata("server"),
        "spec": {
            # KServe labels the pods itself
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": Release()} if spec.kserve
                            else pod.selector("server")},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": allowed,
            "egress": out,
        },
    }  # fmt: skip


def job_policy(spec: QuantizeSpec) -> Tree:
    """Nothing in; out: names, and the hub unless all is at hand. Pods of several nodes talk to one another freely."""
    out: list[Tree] = [] if spec.offline else [_DNS, _HTTPS]
    group = [{"podSelector": {"matchLabels": pod.selector("quantize")}}]
    if spec.nodes > 1:
        out = [_DNS, *out[1:], {"to": group}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": pod.metadata("quantize"),
        "spec": {
            "podSelector": {"matchLabels": pod.selector("quantize")},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": group}] if spec.nodes > 1 else [],
            "egress": out,
        },
    }


def route(spec: ServeSpec) -> Tree:
    """An Ingress, or an HTTPRoute of the Gateway API. Answers stream for minutes, so timeouts are long."""
    host = Value("route.host", spec.host, "Name that clients use.")
    backend = {"service": {"name": Release(), "port": {"name": "http"}}}
    if spec.route == "ingress":
        times = {f"nginx.ingress.kubernetes.io/proxy-{what}-timeout": "3600" for what in ("read", "send")}
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "Ingress",
            "metadata": pod.metadata(
                "server", annotations={**times, "nginx.ingress.kubernetes.io/proxy-buffering": "off"}
            ),
            "spec": {
                "ingressClassName": Value("route.class", spec.ingress_class, "IngressClass."),
                "tls": [{"hosts": [host], "secretName": Release("-tls")}],
                "rules": [
                    {"host": host, "http": {"paths": [{"path": "/v1", "pathType": "Prefix", "backend": backend}]}}
                ],
            },
        }
    parent = {
        "name": Value("route.gateway", spec.gateway, "Gateway."),
        "namespace": Value("route.namespace", spec.gateway_namespace, "Of the controller."),
    }
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": pod.metadata("server"),
        "spec": {
            "parentRefs": [parent],
            "hostnames": [host],
            "rules": [
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}],
                    "backendRefs": [{"name": Release(), "port": 80}],
                    "timeouts": {"request": "3600s"},
                }
            ],
        },
    }


def _namespace(name: Tree) -> Tree:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}
