"""What is asked of a model server's deployment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowbit.runtimes.description import BitsAndBytes


@dataclass(frozen=True)
class ServeWish:
    """What is asked of a deployment; None is filled in. method, format: of a model that is not quantized yet. hardware: as in
    `lowbit recommend`, of one node's GPUs or CPU. source: claim:NAME[/PATH], image:REF[/PATH] or hub:ID[@REVISION].
    secret: of the API key, "" for none. The rest is as in ServeSpec and ServeOptions."""

    runtime: str
    method: str | None = None
    format: str | None = None
    name: str | None = None
    device: str = "auto"
    hardware: str | None = None
    gpus: int | None = None
    nodes: int = 1
    context: int | None = None
    parallel: int = 8
    cpu: int | None = None
    memory: int | None = None
    image: str | None = None
    puller: str | None = None
    source: str | None = None
    replicas: int = 1
    max_replicas: int = 4
    autoscale: Literal["none", "hpa", "keda"] = "none"
    route: Literal["none", "ingress", "gateway"] = "none"
    host: str = "model.example.com"
    kserve: bool = False
    monitoring: bool = True
    secret: str | None = None
    token_secret: str = ""
    node_selector: dict[str, str] | None = None
    bitsandbytes: BitsAndBytes | None = None
    drain: int = 30
    extra: tuple[str, ...] = ()
