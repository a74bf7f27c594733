"""The container of one of lowbit's manifests as a plain process: its command, arguments and variables, folders here for its
volumes, and, where `unshare` is allowed, everything else read-only."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.deploy.documents import read_objects

KEY = "a-key-for-this-run"


def deploy(root: Path, *words: str) -> None:
    """`lowbit deploy` into root/deploy."""
    root.mkdir()
    subprocess.run([sys.executable, "-m", "lowbit.cli", "deploy", *words, "-o", root / "deploy"], check=True)


def objects(root: Path) -> list[dict[str, Any]]:
    """Of the overlay for production."""
    return read_objects([root / "deploy/kustomize/overlays/prod"])


def container(root: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pod and container of the workload."""
    spec = next(each for each in objects(root) if each["kind"] == kind)["spec"]
    spec = spec["replicatedJobs"][0]["template"]["spec"] if kind == "JobSet" else spec
    pod = spec["template"]["spec"]
    return pod, pod["containers"][0]


def mounted(root: Path, pod: dict[str, Any], box: dict[str, Any]) -> dict[str, Path]:
    """A folder here for every mount: path in the container -> folder."""
    folders = {}
    for mount in box["volumeMounts"]:
        folder = root / "volumes" / mount["name"]
        folder.mkdir(parents=True)
        folders[mount["mountPath"]] = folder
    return folders


def start(
    command: list[str], box: dict[str, Any], volumes: dict[str, Path], given: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], bool]:
    """The container's process, with its variables and those `given` alone; whether everything but writable volumes is
    read-only."""
    variables = {"PATH": os.environ["PATH"], **(given or {})}
    for entry in box["env"]:
        variables[entry["name"]] = inside(entry["value"], volumes) if "value" in entry else KEY
    words = [inside(word, volumes) for word in command]
    writable = [str(volumes[m["mountPath"]]) for m in box["volumeMounts"] if not m.get("readOnly")]
    guarded = isolation(writable)
    return subprocess.Popen([*guarded, *words], env=variables), bool(guarded)


def inside(word: str, volumes: dict[str, Path]) -> str:
    """A word with a volume's path here instead of that in the container."""
    for path, folder in sorted(volumes.items(), key=lambda item: -len(item[0])):
        if word == path or word.startswith(path + "/"):
            return str(folder) + word[len(path) :]
    return word


def isolation(writable: list[str]) -> list[str]:
    """A prefix that mounts everything read-only but `writable`, in a mount namespace of its own; [] where it is refused."""
    if shutil.which("unshare") is None:
        return []
    binds = " && ".join(f"mount --bind {shlex.quote(path)} {shlex.quote(path)}" for path in writable)
    script = f"{binds} && mount --bind / /mnt && mount -o remount,bind,ro /mnt"
    inner = " && ".join(f"mount --bind {shlex.quote(path)} /mnt{shlex.quote(path)}" for path in writable)
    system = " && ".join(f"mount --rbind /{name} /mnt/{name}" for name in ("proc", "dev", "sys"))
    entered = f'{script} && {inner} && {system} && cd /mnt && exec chroot /mnt "$@"'
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", entered, "sh"]
    writes = ["sh", "-c", "touch /usr/.lowbit-probe 2>/dev/null && rm /usr/.lowbit-probe && exit 3; exit 0"]
    tried = subprocess.run([*prefix, *writes], capture_output=True)
    return prefix if tried.returncode == 0 else []


def ask(url: str, body: dict[str, Any] | None = None, key: str = "") -> tuple[int, str]:
    """Status and text; 0 while nobody listens."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def free_port() -> int:
    """Of the loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
