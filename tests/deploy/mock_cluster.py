"""A mock of the Kubernetes API server: real HTTP, discovery, server-side apply, strict fields, dry run, conflicts, selectors,
events and logs, for the official client to talk to. No controller runs: a test says what becomes of what was applied."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KINDS = {
    "v1": {"ServiceAccount": "serviceaccounts", "Service": "services", "Secret": "secrets", "ConfigMap": "configmaps",
           "PersistentVolumeClaim": "persistentvolumeclaims", "Pod": "pods", "Event": "events"},
    "apps/v1": {"Deployment": "deployments"},
    "batch/v1": {"Job": "jobs"},
    "jobset.x-k8s.io/v1alpha2": {"JobSet": "jobsets"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies", "Ingress": "ingresses"},
    "autoscaling/v2": {"HorizontalPodAutoscaler": "horizontalpodautoscalers"},
    "monitoring.coreos.com/v1": {"ServiceMonitor": "servicemonitors"},
}  # fmt: skip


@dataclass
class State:
    """objects: path -> object. managers: path -> who applied it. logs: "pod/container" -> text. on_get: changes an object
    before it is handed out, as controllers would. seen: (method, path, query)."""

    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    managers: dict[str, str] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    on_get: Callable[[str, dict[str, Any]], None] = lambda path, found: None
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    kinds: dict[str, dict[str, str]] = field(default_factory=lambda: deepcopy(KINDS))
    token: str = "secret-token"


@contextmanager
def serving(state: State) -> Iterator[str]:
    """Serve it on a free port; gives the URL."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def _handle(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            state.seen.append((self.command, url.path, query))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            if self.headers.get("Authorization") != f"Bearer {state.token}":
                self._answer(401, _status(401, "Unauthorized"))
                return
            self._answer(*answer(state, self.command, url.path, query, body, self.headers.get("Content-Type") or ""))

        do_GET = do_PATCH = do_DELETE = _handle  # noqa: N815

        def _answer(self, status: int, content: dict[str, Any] | str) -> None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def answer(
    state: State, method: str, path: str, query: dict[str, str], body: str, kind: str
) -> tuple[int, dict[str, Any] | str]:
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version in state.kinds and method == "GET":
        resources = [
            {"name": plural, "kind": name, "namespaced": True} for name, plural in state.kinds[version].items()
        ]
        return 200, {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
    if path.endswith("/log"):
        pod = path.split("/")[-2]
        found = state.logs.get(f"{pod}/{query['container']}")
        return (200, found) if found is not None else (400, _status(400, "no log"))
    if method == "PATCH":
        return _apply(state, path, query, body, kind)
    if method == "DELETE":
        return (200, state.objects.pop(path)) if path in state.objects else (404, _status(404, "not found"))
    if path in state.objects:
        found = deepcopy(state.objects[path])
        state.on_get(path, found)
        return 200, found
    listed = [each for each in state.objects.items() if each[0].rpartition("/")[0] == path]
    if path.rpartition("/")[2] in ("pods", "events"):
        wanted = dict(part.split("=") for part in query.get("labelSelector", "").split(",") if part)
        items = [each for _, each in listed if wanted.items() <= each["metadata"].get("labels", {}).items()]
        return 200, {"kind": "List", "items": items}
    return 404, _status(404, f"{path} not found")


def _apply(state: State, path: str, query: dict[str, str], body: str, kind: str) -> tuple[int, dict[str, Any] | str]:
    if kind != "application/apply-patch+yaml" or not query.get("fieldManager"):
        return 415, _status(415, "no server-side apply")
    content = json.loads(body)
    if "image" in str(content.get("spec")) and "imagePolice" in body and query.get("fieldValidation") == "Strict":
        return 400, _status(400, 'strict decoding error: unknown field "imagePolice"')
    if state.managers.get(path, query["fieldManager"]) != query["fieldManager"] and query.get("force") != "true":
        return 409, _status(409, f'Apply failed with 1 conflict: conflict with "{state.managers[path]}"')
    before = state.objects.get(path)
    version = int(before["metadata"]["resourceVersion"]) if before else 0
    spec = {key: value for key, value in content.items() if key not in ("metadata", "status")}
    same = before is not None and all(before.get(key) == value for key, value in spec.items())
    made = {**(before or {}), **content}
    made["metadata"] = {
        **content["metadata"],
        "resourceVersion": str(version if same else version + 1),
        "generation": 1,
    }
    if "dryRun" not in query:
        state.objects[path] = made
        state.managers[path] = query["fieldManager"]
    return (200 if before else 201), made


def _status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "status": "Failure", "code": code, "message": message}
