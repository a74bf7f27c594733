"""Without a cluster: Docker compose, systemd, Ollama, from the same specs."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from lowbit.core.errors import RecipeError
from lowbit.deploy.objects.pod import HOME, MODELS, OUTPUT, USER
from lowbit.deploy.objects.serve import load_seconds
from lowbit.deploy.outputs.files import to_yaml
from lowbit.deploy.spec import Common, QuantizeSpec, ServeSpec

_MIB = 2**20


def compose_serve(spec: ServeSpec, models: str) -> dict[str, str]:
    """compose.yaml of a server; `models`: folder on this machine that becomes /models. The key comes from a file .env."""
    service = _service(spec)
    probe = f"http://127.0.0.1:{spec.port}{spec.health_path}"
    key = [spec.api_key_variable] if spec.api_key_variable and spec.api_key_secret else []
    service |= {
        "command": list(spec.args),
        "environment": {**_environment(spec), **{name: f"${{{name}:?put it into .env}}" for name in key}},
        # reachable from this machine alone; a proxy with TLS is what others talk to
        "ports": [f"127.0.0.1:{spec.port}:{spec.port}"],
        "volumes": [f"{models}:{MODELS}:ro"],
        "restart": "unless-stopped",
        "stop_grace_period": f"{spec.drain + 15}s",
        "healthcheck": {
            "test": ["CMD", "curl", "-fsS", probe],
            "interval": "15s",
            "timeout": "5s",
            "retries": 4,
            "start_period": f"{load_seconds(spec)}s",
        },
    }
    service |= _shm(spec.shm)
    files = {"compose.yaml": to_yaml({"name": spec.name, "services": {"server": service}})}
    return files | ({".env.example": "".join(f"{name}=\n" for name in key)} if key else {})


def compose_quantize(spec: QuantizeSpec, models: str, output: str) -> dict[str, str]:
    """compose.yaml of a quantization, with its recipes beside it; run it again to continue. Raises RecipeError for several
    nodes."""
    if spec.nodes > 1:
        raise RecipeError("compose knows one machine", hint="--nodes 1, or --target kubernetes")
    services = {}
    files = {}
    for index, run in enumerate(spec.runs):
        files[f"recipes/{index}.yaml"], files[f"recipes/{index}.output"] = run.recipe, run.output
        service = _service(spec)
        service |= {
            "command": list(spec.args),
            "environment": {**_environment(spec), "JOB_COMPLETION_INDEX": str(index)},
            "volumes": ["./recipes:/recipes:ro", f"{output}:{OUTPUT}"]
            + ([f"{models}:{MODELS}:ro"] if spec.model_claim else []),
            "restart": "on-failure:6",
            **_shm(spec.shm),
        }
        services[run.name] = service
    return {"compose.yaml": to_yaml({"name": spec.name, "services": services}), **files}


def _shm(nbytes: int) -> dict[str, str]:
    return {"shm_size": f"{math.ceil(nbytes / _MIB)}m"} if nbytes else {}


def _service(spec: Common) -> dict[str, Any]:
    service: dict[str, Any] = {
        "image": spec.image.reference,
        **({"entrypoint": list(spec.command)} if spec.command else {}),
        "user": f"{USER}:{USER}",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "tmpfs": ["/tmp", f"{HOME}:uid={USER},gid={USER},mode=0700"],
        "mem_limit": f"{math.ceil(spec.memory / _MIB)}m",
    }
    if spec.gpus:
        device = {"driver": "nvidia", "count": spec.gpus, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    else:
        service["cpus"] = spec.cpu
    return service


def _environment(spec: Common) -> dict[str, str]:
    return {"HOME": HOME, "USER": "lowbit", "TMPDIR": "/tmp", **spec.env}


def systemd_serve(spec: ServeSpec, program: list[str], args: list[str]) -> dict[str, str]:
    """A unit that starts the runtime as it is installed on this machine; `args` have the model's path there."""
    if not Path(program[0]).is_absolute():
        raise RecipeError(
            f"a systemd unit needs the whole path of {program[0]!r}", hint="--program /usr/local/bin/llama-server"
        )
    key = f"EnvironmentFile=/etc/lowbit/{spec.name}.env\n" if spec.api_key_variable and spec.api_key_secret else ""
    variables = "".join(f'Environment="{name}={value}"\n' for name, value in spec.env.items())
    unit = f"""[Unit]
Description={spec.model} by {spec.runtime}
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={shlex.join([*program, *args]).replace("%", "%%")}
{variables}{key}Environment=HOME=/var/lib/{spec.name}
DynamicUser=yes
StateDirectory={spec.name}
Restart=on-failure
RestartSec=5
TimeoutStopSec={spec.drain + 15}
MemoryMax={spec.memory}
CPUQuota={spec.cpu * 100}%
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateDevices={"no" if spec.gpus else "yes"}
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
CapabilityBoundingSet=
LockPersonality=yes

[Install]
WantedBy=multi-user.target
"""
    return {f"{spec.name}.service": unit}


def ollama(spec: ServeSpec, file: str, context: int) -> dict[str, str]:
    """A Modelfile. Raises RecipeError for what Ollama does not read."""
    if not file.endswith(".gguf"):
        raise RecipeError("Ollama serves GGUF files alone", hint="--method q4_k_m, or a .gguf file")
    return {"Modelfile": f"FROM {file}\nPARAMETER num_ctx {context}\nPARAMETER num_thread {spec.cpu}\n"}
