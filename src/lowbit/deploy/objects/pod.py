"""What every pod here has: labels, security, scratch volumes, images, GPUs."""

from __future__ import annotations

from typing import Any

from lowbit.deploy.quantity import gibibytes
from lowbit.deploy.spec import Common, Image, Volume
from lowbit.deploy.template import Release, Text, Tree, Value, When

HOME, MODELS, OUTPUT = "/home/lowbit", "/models", "/output"
# no user of an image has it, and it is above 10000, where hosts have no users either
USER = 10001
MIB = 2**20


def selector(component: str) -> dict[str, Tree]:
    """Labels that pods are found by; they never change."""
    return {
        "app.kubernetes.io/name": f"lowbit-{component}",
        "app.kubernetes.io/instance": Release(),
    }


def metadata(component: str, suffix: str = "", **more: Tree) -> dict[str, Tree]:
    """Name and labels of an object."""
    labels = {**selector(component), "app.kubernetes.io/component": component, "app.kubernetes.io/part-of": "lowbit"}
    return {"name": Release(suffix), "labels": labels, **more}


def image(chosen: Image, path: str = "image") -> Text:
    """repository:tag@digest, every part a knob."""
    return Text(
        (
            Value(f"{path}.repository", chosen.repository, "Image without tag."),
            ":",
            Value(f"{path}.tag", chosen.tag, "Pinned; latest is refused."),
            Value(f"{path}.digest", f"@{chosen.digest}" if chosen.digest else "", "@sha256:... or empty."),
        )
    )


def pod_security() -> dict[str, Any]:
    """The restricted Pod Security Standard."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        # the default would change the owner of every file of a large volume at every start
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> dict[str, Any]:
    """No privileges, no writing but to volumes."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    }


def environment(spec: Common) -> list[Tree]:
    """Plain variables, and those that a user without an entry in /etc/passwd and a read-only root need."""
    usual = {"HOME": HOME, "USER": "lowbit", "TMPDIR": "/tmp", "PYTHONUNBUFFERED": "1"}
    return [{"name": name, "value": value} for name, value in {**usual, **spec.env}.items()]


def token(spec: Common) -> list[Tree]:
    """The hub's token from its Secret."""
    if not spec.token_secret:
        return []
    reference = {"name": Value("hub.tokenSecret", spec.token_secret, "Secret with the key token."), "key": "token"}
    return [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}}]


def resources(spec: Common) -> dict[str, Tree]:
    """Memory and GPUs with requests equal to limits. The CPU is limited only where threads are set to it: elsewhere a limit
    would only throttle what other pods leave idle."""
    memory = Value("resources.memory", gibibytes(spec.memory), "Request and limit.")
    cpu = Value("resources.cpu", str(spec.cpu), "Cores.")
    requests: dict[str, Tree] = {"cpu": cpu, "memory": memory, "ephemeral-storage": "1Gi"}
    limits: dict[str, Tree] = {"memory": memory, "ephemeral-storage": gibibytes(spec.scratch + 2**30)}
    if not spec.gpus:
        limits["cpu"] = cpu
    if spec.gpus:
        count = Value("resources.gpus", str(spec.gpus), "GPUs of a pod.")
        requests[spec.gpu_resource] = limits[spec.gpu_resource] = count
    return {"requests": requests, "limits": limits}


def scratch_mounts() -> list[Tree]:
    """Where a read-only root is written to all the same."""
    return [{"name": "home", "mountPath": HOME}, {"name": "tmp", "mountPath": "/tmp"}]


def scratch_volumes(spec: Common) -> list[Tree]:
    """Their volumes."""
    return [
        {"name": "home", "emptyDir": {"sizeLimit": gibibytes(spec.scratch * 3 / 4)}},
        {"name": "tmp", "emptyDir": {"sizeLimit": gibibytes(spec.scratch / 4)}},
    ]


def shm_volume(nbytes: int) -> dict[str, Tree]:
    """/dev/shm, which has 64 MiB in a container: where processes of one pod hand tensors to each other."""
    return {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": gibibytes(nbytes)}}


def model_volume(source: Volume, nbytes: int) -> dict[str, Tree]:
    """The volume with the model, only for reading."""
    if source.kind == "claim":
        claim = Value(
            "model.claim", source.ref, "PersistentVolumeClaim; ReadOnlyMany or ReadWriteMany for several nodes."
        )
        return {"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
    if source.kind == "image":
        reference = Value("model.image", source.ref, "OCI image with the model's files.")
        return {"name": "models", "image": {"reference": reference, "pullPolicy": "IfNotPresent"}}
    return {"name": "models", "emptyDir": {"sizeLimit": gibibytes(nbytes * 1.1 + 2**30)}}


def placement(spec: Common) -> dict[str, Tree]:
    """Nodes. Where GPUs are asked for, the taint that keeps other pods off them is tolerated."""
    tolerations: list[Any] = [{"key": spec.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "nodeSelector": Value("nodeSelector", dict(spec.node_selector), "Labels of nodes."),
        "tolerations": Value("tolerations", tolerations if spec.gpus else [], "Taints that are tolerated."),
    }


def always_pull() -> Value:
    """A digest or a pinned tag need not be pulled anew; a registry that checks credentials wants to be asked."""
    return Value("image.pullPolicy", "IfNotPresent", "Always, IfNotPresent or Never.")


def enabled(path: str, default: bool, then: Tree, text: str = "") -> When:
    """`then` where the knob `path`.enabled is on."""
    return When(f"{path}.enabled", default, then, text=text)
