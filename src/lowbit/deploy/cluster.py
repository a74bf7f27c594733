"""Apply, wait, delete: plain requests of the Kubernetes API through the official client (package kubernetes).

Server-side apply as in the API reference, "Server-Side Apply"; rollout status as in kubectl's rollout_status.go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.core.errors import LowbitError
from lowbit.deploy.template import Objects

MANAGER = "lowbit"
_ORDER = ("Namespace", "ServiceAccount", "Secret", "ConfigMap", "PersistentVolumeClaim", "NetworkPolicy", "Service")
# refers to pods that have to be there, or does nothing without them
_LAST = ("HorizontalPodAutoscaler", "ScaledObject", "PodDisruptionBudget", "ServiceMonitor", "Ingress", "HTTPRoute")
Say = Callable[[str], None]


class ClusterError(LowbitError):
    """A cluster cannot be reached, refuses something, or what was applied does not get ready."""


@dataclass
class Cluster:
    """A connection. api: kubernetes.client.ApiClient. namespace: of objects that name none."""

    api: Any
    namespace: str = "default"
    _kinds: dict[tuple[str, str], tuple[str, bool]] = field(default_factory=dict)

    def apply(self, content: Mapping[str, Any], *, dry_run: bool = False, force: bool = False) -> dict[str, Any]:
        """Server-side apply of one object. force: take over fields that others manage. Raises ClusterError."""
        query = [("fieldManager", MANAGER), ("fieldValidation", "Strict")]
        query += [("dryRun", "All")] if dry_run else []
        query += [("force", "true")] if force else []
        return self._ask("PATCH", self.path(content), query, json.dumps(content), "application/apply-patch+yaml")

    def get(self, content: Mapping[str, Any]) -> dict[str, Any] | None:
        """The object as the cluster has it, None where it is not there."""
        try:
            return self._ask("GET", self.path(content), [])
        except NotFoundError:
            return None

    def delete(self, content: Mapping[str, Any]) -> bool:
        """Whether it was there."""
        try:
            self._ask("DELETE", self.path(content), [("propagationPolicy", "Background")])
        except NotFoundError:
            return False
        return True

    def items(self, plural: str, namespace: str, **query: str) -> Objects:
        """Items of a kind of the core API."""
        found = self._ask("GET", f"/api/v1/namespaces/{namespace}/{plural}", list(query.items()))
        listed: Objects = found.get("items") or []
        return listed

    def log(self, pod: str, container: str, namespace: str, *, lines: int = 15, previous: bool = False) -> str:
        """The end of a container's log, "" where it has none."""
        query = [("container", container), ("tailLines", str(lines))] + ([("previous", "true")] if previous else [])
        try:
            return self._text("GET", f"/api/v1/namespaces/{namespace}/pods/{pod}/log", query)
        except ClusterError:
            return ""

    def path(self, content: Mapping[str, Any]) -> str:
        """Of an object. Raises ClusterError for a kind that the cluster does not know."""
        version, kind = str(content["apiVersion"]), str(content["kind"])
        plural, namespaced = self._plural(version, kind)
        root = f"/api/{version}" if "/" not in version else f"/apis/{version}"
        space = f"/namespaces/{self.namespace_of(content)}" if namespaced else ""
        return f"{root}{space}/{plural}/{content['metadata']['name']}"

    def namespace_of(self, content: Mapping[str, Any]) -> str:
        """Its own, else the connection's."""
        return str(content["metadata"].get("namespace") or self.namespace)

    def _plural(self, version: str, kind: str) -> tuple[str, bool]:
        if (version, kind) not in self._kinds:
            root = f"/api/{version}" if "/" not in version else f"/apis/{version}"
            try:
                listed = self._ask("GET", root, []).get("resources") or []
            except NotFoundError:
                listed = []
            for each in listed:
                if "/" not in each["name"]:
                    self._kinds[version, each["kind"]] = each["name"], bool(each.get("namespaced"))
        if (version, kind) not in self._kinds:
            raise ClusterError(f"the cluster knows no {kind} of {version}", hint=_provider(version))
        return self._kinds[version, kind]

    def _ask(
        self,
        method: str,
        path: str,
        query: list[tuple[str, str]],
        body: str | None = None,
        kind: str = "application/json",
    ) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._text(method, path, query, body, kind) or "{}")
        return answer

    def _text(
        self,
        method: str,
        path: str,
        query: list[tuple[str, str]],
        body: str | None = None,
        kind: str = "application/json",
    ) -> str:
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json, */*", "Content-Type": kind}
        request = self.api.param_serialize(
            method, path, query_params=query, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        try:
            response = self.api.call_api(*request, _request_timeout=60)
            text = (response.read() or b"").decode()
        except (HTTPError, OSError) as error:
            raise ClusterError(f"the cluster does not answer: {error}", hint="kubectl cluster-info") from error
        if response.status == 404:
            raise NotFoundError(f"{path} is not there")
        if not 200 <= response.status <= 299:
            raise _refused(response.status, method, path, text)
        return text


class NotFoundError(ClusterError):
    """An object, or a kind, is not there."""


def connect(*, context: str | None = None, kubeconfig: Path | None = None, namespace: str | None = None) -> Cluster:
    """By kubeconfig, or inside a cluster by its service account. Raises ClusterError."""
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise ClusterError("the package kubernetes is not installed", hint="pip install 'lowbit[deploy]'") from error
    configuration = client.Configuration()
    inside = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    try:
        if kubeconfig is None and context is None and inside.is_file():
            config.load_incluster_config(client_configuration=configuration)
            own = inside.read_text().strip()
        else:
            file = None if kubeconfig is None else str(kubeconfig)
            config.load_kube_config(config_file=file, context=context, client_configuration=configuration)
            _, active = config.list_kube_config_contexts(config_file=file)
            own = str((active.get("context") or {}).get("namespace") or "default")
    except (config.ConfigException, OSError) as error:
        raise ClusterError(f"no cluster is known here: {error}", hint="--kubeconfig FILE, or KUBECONFIG") from error
    return Cluster(client.ApiClient(configuration), namespace or own)


def ordered(contents: Objects) -> Objects:
    """In the order that they are applied in: what others need first."""

    def rank(content: Mapping[str, Any]) -> int:
        kind = content["kind"]
        return _ORDER.index(kind) if kind in _ORDER else 200 if kind in _LAST else 100

    return sorted(contents, key=rank)


def apply_all(cluster: Cluster, contents: Objects, say: Say, *, dry_run: bool = False, force: bool = False) -> None:
    """Apply all objects. Before anything is changed, Secrets and claims that pods need and nobody here makes are looked
    for, and the kinds. Raises ClusterError."""
    for content in contents:
        cluster.path(content)
    missing = missing_references(cluster, contents)
    if missing and not dry_run:
        raise ClusterError(f"{', '.join(missing)} not there, so pods would not start; nothing was applied",
                           hint="the README.md beside the manifests says how they are made")  # fmt: skip
    for each in missing:
        say(f"missing   {each}")
    for content in ordered(contents):
        before = cluster.get(content)
        after = cluster.apply(content, dry_run=dry_run, force=force)
        state = "created" if before is None else "unchanged" if _same(before, after) else "configured"
        say(f"{state:<10}{content['kind']}/{content['metadata']['name']}{' (dry run)' if dry_run else ''}")


def delete_all(cluster: Cluster, contents: Objects, say: Say, *, with_data: bool = False) -> None:
    """Delete all objects, the last applied first. Claims, which hold artifacts, are kept unless `with_data`."""
    for content in reversed(ordered(contents)):
        what = f"{content['kind']}/{content['metadata']['name']}"
        if content["kind"] in ("PersistentVolumeClaim", "Namespace") and not with_data:
            say(f"kept      {what}")
        else:
            say(f"{'deleted' if cluster.delete(content) else 'not there':<10}{what}")


def missing_references(cluster: Cluster, contents: Objects) -> list[str]:
    """Secrets, ConfigMaps and claims that pods refer to, which are neither here nor in the cluster."""
    own = {(content["kind"], content["metadata"]["name"]) for content in contents}
    wanted: dict[tuple[str, str, str], None] = {}
    for content in contents:
        for kind, name in _references(content):
            if (kind, name) not in own:
                wanted[kind, name, cluster.namespace_of(content)] = None
    found = []
    for kind, name, namespace in wanted:
        metadata = {"name": name, "namespace": namespace}
        if cluster.get({"apiVersion": "v1", "kind": kind, "metadata": metadata}) is None:
            found.append(f"{kind} {name}")
    return found


def _references(tree: Any) -> list[tuple[str, str]]:
    found = []
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key == "secretKeyRef" and not value.get("optional"):
                found.append(("Secret", str(value["name"])))
            elif key == "persistentVolumeClaim" and "claimName" in value:
                found.append(("PersistentVolumeClaim", str(value["claimName"])))
            elif key == "configMap" and isinstance(value, Mapping) and "name" in value:
                found.append(("ConfigMap", str(value["name"])))
            else:
                found += _references(value)
    elif isinstance(tree, list):
        for item in tree:
            found += _references(item)
    return found


def _same(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return bool(before["metadata"].get("resourceVersion") == after["metadata"].get("resourceVersion"))


def _refused(status: int, method: str, path: str, text: str) -> ClusterError:
    try:
        message = str(json.loads(text).get("message") or text)
    except ValueError:
        message = text
    hints = {
        401: "log in again: kubectl cluster-info",
        403: "ask for the right: kubectl auth can-i " + ("patch" if method == "PATCH" else method.lower()),
        409: "--force-conflicts takes these fields over; a Job that changed has to be deleted first",
        422: "lowbit deploy validate; a Job or a claim cannot be changed: delete it first",
    }
    return ClusterError(f"the cluster refuses {path.rpartition('/')[2]} ({status}): {message[:400]}",
                        hint=hints.get(status, "kubectl get events"))  # fmt: skip


def _provider(version: str) -> str:
    group = version.partition("/")[0]
    known = {
        "keda.sh": "install KEDA, or --autoscale hpa",
        "monitoring.coreos.com": "install the Prometheus operator, or --no-monitoring",
        "leaderworkerset.x-k8s.io": "install LeaderWorkerSet",
        "jobset.x-k8s.io": "install JobSet, or --nodes 1",
        "gateway.networking.k8s.io": "install the Gateway API, or --route ingress",
        "serving.kserve.io": "install KServe, or leave --kserve out",
    }
    return known.get(group, "kubectl api-resources")
