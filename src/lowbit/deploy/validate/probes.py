"""Ports and probes: a server that loads for minutes must not be killed meanwhile, nor be asked before it answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowbit.deploy.documents import Document
from lowbit.deploy.validate.finding import Change, Finding
from lowbit.deploy.validate.view import Container, at, items, mapping, pods

_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_PORTS = {"vllm": 8000, "llama.cpp": 8080, "tensorrt-llm": 8000, "transformers": 8000}
_KEYS = {"vllm": "VLLM_API_KEY", "llama.cpp": "LLAMA_API_KEY", "transformers": "LOWBIT_API_KEY"}


def _ports(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        for container in pod.every_container:
            listed = items(container.content.get("ports"))
            names, numbers = {port.get("name") for port in listed}, {port.get("containerPort") for port in listed}
            for probe in _PROBES:
                port = _port(container, probe)
                if port is None:
                    continue
                place = (*container.path, probe)
                if isinstance(port, str) and port not in names and not port.isdigit():
                    yield Finding(
                        "probe-port",
                        "error",
                        document,
                        place,
                        f"there is no port named {port!r}",
                        f"one of {', '.join(sorted(str(name) for name in names if name)) or 'none here'}",
                    )
                # a port need not be declared to be asked, but of a server we know where it listens
                elif isinstance(port, int) and container.runtime and port not in numbers | {_listens(container)}:
                    yield Finding(
                        "probe-port",
                        "error",
                        document,
                        place,
                        f"it asks port {port}, and the server listens on {_listens(container)}",
                        "the server's port",
                    )
            if not container.runtime or not document.kind:
                continue
            serves = _listens(container)
            if serves is not None and numbers and serves not in numbers:
                yield Finding(
                    "server-port",
                    "error",
                    document,
                    (*container.path, "ports"),
                    f"the server listens on {serves}, and the container's ports are {', '.join(map(str, numbers))}",
                    f"containerPort: {serves}",
                )
            host = container.flag("--host")
            default = "localhost" if container.runtime == "transformers" else "0.0.0.0"
            if (host if host is not None else default) in ("localhost", "127.0.0.1"):
                yield Finding(
                    "loopback",
                    "error",
                    document,
                    container.place("--host"),
                    "the server listens on the pod's loopback only: neither probes nor clients reach it",
                    "--host 0.0.0.0",
                )


def _listens(container: Container) -> int | None:
    given = container.flag("--port")
    return int(given) if given and given.isdigit() else _PORTS[container.runtime] if given is None else None


def _port(container: Container, probe: str) -> object:
    content = mapping(container.content.get(probe))
    port = at(content, "httpGet", "port")
    return at(content, "tcpSocket", "port") if port is None else port


def _patience(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    if document.kind not in ("Deployment", "StatefulSet", "LeaderWorkerSet"):
        return
    for pod in pods(document):
        for container in pod.containers:
            headless = "--headless" in container.flags
            if not container.runtime or headless:
                continue
            content, health = container.content, {"httpGet": {"path": "/health", "port": _first_port(container)}}
            if not content.get("readinessProbe"):
                yield Finding(
                    "no-readiness",
                    "warning",
                    document,
                    container.path,
                    "without a readiness probe clients are sent to a pod that still loads",
                    "readinessProbe on /health",
                    (Change((*container.path, "readinessProbe"), health),),
                )
            if content.get("livenessProbe") and not content.get("startupProbe"):
                waits = mapping(content["livenessProbe"])
                patience = int(waits.get("initialDelaySeconds", 0)) + (
                    int(waits.get("periodSeconds", 10)) * int(waits.get("failureThreshold", 3))
                )
                if patience < 300:
                    yield Finding(
                        "killed-while-loading",
                        "error",
                        document,
                        (*container.path, "livenessProbe"),
                        f"a pod that has not loaded within {patience} s is killed, and begins again, for ever",
                        "a startupProbe that waits as long as loading may take",
                        (
                            Change(
                                (*container.path, "startupProbe"),
                                {**health, "periodSeconds": 10, "failureThreshold": 60},
                            ),
                        ),
                    )
            yield from _paths(container)
            startup = mapping(content.get("startupProbe"))
            deadline = at(document.content, "spec", "progressDeadlineSeconds") or 600
            budget = int(startup.get("periodSeconds", 10)) * int(startup.get("failureThreshold", 3)) if startup else 0
            if document.kind == "Deployment" and budget > deadline:
                place = ("spec", "progressDeadlineSeconds")
                yield Finding(
                    "deadline",
                    "error",
                    document,
                    place,
                    f"loading may take {budget} s, and the rollout is given up after {deadline} s",
                    "a progressDeadlineSeconds above it",
                    (Change(place, budget + 900),),
                )


def _first_port(container: Container) -> object:
    port = next(iter(items(container.content.get("ports"))), {})
    return port.get("name") or port.get("containerPort") or _PORTS[container.runtime]


def _paths(container: Container) -> Iterator[Finding]:
    key = _KEYS.get(container.runtime, "") in container.env or "--api-key" in container.flags
    for probe in _PROBES:
        path = str(at(container.content, probe, "httpGet", "path") or "")
        place = (*container.path, probe, "httpGet", "path")
        if path.startswith("/v1/") and key:
            yield Finding(
                "probe-key",
                "error",
                container.document,
                place,
                f"{path} answers 401 to who has no key, so the pod never gets ready",
                "/health, which is open",
                (Change(place, "/health"),),
            )
        if path in ("/healthz", "/ready", "/v2/health/ready", "/ping") and container.runtime in ("vllm", "llama.cpp"):
            if container.runtime == "vllm" and path == "/ping":
                continue
            yield Finding(
                "probe-path",
                "error",
                container.document,
                place,
                f"{container.runtime} has no {path}",
                "/health",
                (Change(place, "/health"),),
            )


def _surge(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    if document.kind != "Deployment" or at(document.content, "spec", "strategy", "type") == "Recreate":
        return
    surge = at(document.content, "spec", "strategy", "rollingUpdate", "maxSurge")
    for pod in pods(document):
        if any(container.gpus and container.runtime for container in pod.containers) and surge != 0:
            place = ("spec", "strategy")
            yield Finding(
                "gpu-surge",
                "warning",
                document,
                place,
                "a rollout starts the new pod first, which waits for a GPU that the old one holds",
                "maxSurge: 0, maxUnavailable: 1",
                (Change(place, {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}),),
            )


RULES = (_ports, _patience, _surge)
