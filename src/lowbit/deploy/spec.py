"""What is deployed, typed and checked; every output (Kustomize, Helm, compose, systemd, Ollama) is made from it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,51}[a-z0-9])?")


def _dns_label(value: str) -> str:
    if _LABEL.fullmatch(value) is None:
        raise ValueError("is no DNS label: small letters, digits and '-', a letter first, at most 53")
    return value


# Helm allows release names of 53 characters, so that suffixes still fit into the 63 of a label
Name = Annotated[str, AfterValidator(_dns_label)]


def dns_name(text: str) -> str:
    """A DNS label made of any name: "Llama-3.2-1B_Q4" -> "llama-3-2-1b-q4"."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"m-{plain}"
    return plain[:53].rstrip("-")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Image(_Strict):
    """A container image. digest: "sha256:...", "" for none; it wins over the tag."""

    repository: str
    tag: str
    digest: str = ""

    @property
    def reference(self) -> str:
        """As a container runtime takes it."""
        return f"{self.repository}:{self.tag}" + (f"@{self.digest}" if self.digest else "")


class Volume(_Strict):
    """Where a model comes from (or an artifact goes). kind "claim": ref is a PersistentVolumeClaim; "image": ref is an OCI
    image with the files (Kubernetes 1.35 has such volumes on by default); "pull": ref is a hub id, which an init container
    downloads into every pod. path: inside of it. revision: of a hub id."""

    kind: Literal["claim", "image", "pull"]
    ref: str
    path: str = ""
    revision: str = ""


class Metric(_Strict):
    """What autoscaling looks at: one replica for every `threshold` of it. name: as the runtime exports it."""

    name: str
    threshold: float


class Common(_Strict):
    """What Jobs and servers share. Amounts in bytes; cpu in cores. env: plain variables. gpus: of each pod.
    node_selector: labels of nodes. token_secret: Secret with the key "token" of the hub, "" for none."""

    name: Name
    image: Image
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    cpu: int = Field(default=4, ge=1)
    memory: int = Field(ge=1)
    gpus: int = Field(default=0, ge=0)
    gpu_resource: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = Field(default_factory=dict)
    scratch: int = Field(default=10 * 2**30, ge=2**20)
    token_secret: str = ""


class ServeSpec(Common):
    """A model server.

    model: what clients call it. location: of the model inside the container. weight_bytes: sizes probes and pulls.
    port, health_path, metrics_path ("" has none): of the runtime. api_key_variable: "" knows no keys; api_key_secret: Secret
    with the key "api-key". metrics_key: metrics ask for the key too. threads: the number of `cpu` stands in args and env
    wherever `threads_follow` is given, so that they change together. warmup: seconds from loaded to ready.
    nodes: more than 1 makes a LeaderWorkerSet. kserve: an LLMInferenceService instead of Deployment and Service.
    """

    runtime: str
    model: str
    location: str
    source: Volume
    weight_bytes: int = Field(ge=0)
    port: int = Field(default=8000, ge=1, le=65535)
    health_path: str = "/health"
    metrics_path: str = "/metrics"
    metrics_key: bool = False
    api_key_variable: str = ""
    api_key_secret: str = ""
    shm: int = Field(default=0, ge=0)
    warmup: int = Field(default=60, ge=1)
    drain: int = Field(default=30, ge=0)
    replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    autoscale: Literal["none", "hpa", "keda"] = "none"
    metric: Metric | None = None
    prometheus: str = "http://prometheus-operated.monitoring.svc:9090"
    monitoring: bool = True
    monitoring_namespace: str = "monitoring"
    route: Literal["none", "ingress", "gateway"] = "none"
    host: str = "model.example.com"
    ingress_class: str = "nginx"
    gateway: str = "gateway"
    gateway_namespace: str = "gateway-system"
    nodes: int = Field(default=1, ge=1)
    kserve: bool = False
    puller: Image | None = None
    threads: bool = False


class SweepItem(_Strict):
    """One run of a sweep: a name, the recipe as YAML, and the artifact's path inside the output volume."""

    name: Name
    recipe: str
    output: str


class QuantizeSpec(Common):
    """A quantization.

    model: path of the checkpoint in the container, or a hub id. model_claim: claim that holds it, "" for a hub id.
    runs: one for a Job, several for an Indexed Job. nodes: more than 1 makes a JobSet, of one run. output_claim:
    where artifacts and journal lie; created with output_bytes where create_claim. deadline: seconds for all tries (of
    a JobSet: of each). queue: Kueue's, "" for none.
    """

    model: str
    model_claim: str = ""
    runs: tuple[SweepItem, ...] = Field(min_length=1)
    parallel: int = Field(default=1, ge=1)
    nodes: int = Field(default=1, ge=1)
    shm: int = Field(default=0, ge=0)
    output_claim: str
    output_bytes: int = Field(ge=0)
    create_claim: bool = True
    storage_class: str = ""
    deadline: int = Field(default=24 * 3600, ge=60)
    retries: int = Field(default=6, ge=0)
    keep: int = Field(default=7 * 24 * 3600, ge=0)
    queue: str = ""
    offline: bool = False
