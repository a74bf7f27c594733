"""What the runtimes' releases took away, and what they read by themselves.

Sources: vLLM's release notes 0.8 to 0.32 and `vllm serve --help`; llama.cpp, tools/server/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowbit.deploy.documents import Document, KeyPath
from lowbit.deploy.validate.finding import REMOVE, Change, Finding
from lowbit.deploy.validate.view import Container, pods

# flag -> why, what instead; of vLLM 0.32
_GONE = {
    "--swap-space": "the V1 engine recomputes instead of swapping; leave it out",
    "--task": "use --runner (generate is found by itself); leave it out",
    "--disable-log-requests": "requests are not logged unless --enable-log-requests is given; leave it out",
    "--num-lookahead-slots": "part of --speculative-config now",
    "--speculative-model": "--speculative-config '{\"model\": ...}'",
    "--num-speculative-tokens": "part of --speculative-config now",
    "--use-v2-block-manager": "there is one block manager; leave it out",
    "--preemption-mode": "always recompute; leave it out",
    "--worker-use-ray": "--distributed-executor-backend ray",
    "--engine-use-ray": "leave it out",
    "--guided-decoding-backend": "--structured-outputs-config",
    "--num-scheduler-steps": "leave it out",
    "--device": "each build has one; leave it out",
}
_LEAVE_OUT = frozenset(
    {
        "--swap-space",
        "--task",
        "--disable-log-requests",
        "--use-v2-block-manager",
        "--preemption-mode",
        "--engine-use-ray",
        "--num-scheduler-steps",
        "--num-lookahead-slots",
        "--device",
    }
)
_WITHOUT_VALUE = frozenset({"--disable-log-requests", "--use-v2-block-manager", "--engine-use-ray"})
_GONE_LLAMA = {
    "--ctx-size-draft": "leave it out",
    "--embedding-only": "--embeddings",
    "--n-gpu-layers-draft": "--gpu-layers-draft",
    "--memory-f32": "--cache-type-k f32 --cache-type-v f32",
    "--memory-f16": "leave it out",
    "--log-format": "leave it out",
    "--system-prompt-file": "leave it out; clients send it",
}


def _vllm(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for container in _serving(document, "vllm"):
        for flag, instead in _GONE.items():
            if flag in container.flags:
                yield Finding(
                    "vllm-flag",
                    "error",
                    document,
                    container.place(flag),
                    f"vLLM has no {flag} any more and refuses to start",
                    instead,
                    without(container, flag) if flag in _LEAVE_OUT else (),
                )
        words = [word for _, word in container.words]
        module = next((i for i, word in enumerate(words) if word.startswith("vllm.entrypoints.")), None)
        if module is not None:
            yield Finding(
                "vllm-entrypoint",
                "warning",
                document,
                container.words[module][0],
                "python -m vllm.entrypoints... is deprecated",
                "command: [vllm, serve, MODEL]",
            )
        yield from _quantization(container)
        share = container.flag("--gpu-memory-utilization")
        if share and _number(share) is not None and not 0 < (_number(share) or 0) <= 1:
            yield Finding(
                "gpu-memory",
                "error",
                document,
                container.place("--gpu-memory-utilization"),
                f"{share} is no share of the GPU's memory",
                "0.9",
            )
        lengths = container.flag("--max-model-len")
        if lengths and not lengths.lower().rstrip("kmg").replace(".", "").isdigit() and lengths not in ("auto", "-1"):
            yield Finding(
                "max-model-len",
                "error",
                document,
                container.place("--max-model-len"),
                f"{lengths!r} is no number of tokens",
                "--max-model-len 8192",
            )


def _quantization(container: Container) -> Iterator[Finding]:
    document, asked = container.document, (container.flag("--quantization", "-q") or "").lower()
    name = "--quantization" if "--quantization" in container.flags else "-q"
    model = container.model.lower()
    custom = container.image.split("@")[0].rpartition(":")[0] not in (
        "vllm/vllm-openai",
        "vllm/vllm-openai-cpu",
        "docker.io/vllm/vllm-openai",
    )
    if (asked == "gguf" or model.endswith(".gguf") or model.endswith("-gguf")) and not custom:
        yield Finding(
            "vllm-gguf",
            "error",
            document,
            container.place(name),
            "GGUF left vLLM 0.24; it needs vllm-gguf-plugin, which the image lacks",
            "llama.cpp for GGUF, or an AWQ, GPTQ or compressed-tensors checkpoint for vLLM",
        )
    elif (asked == "bitsandbytes" or container.flag("--load-format") == "bitsandbytes") and not custom:
        yield Finding(
            "vllm-bitsandbytes",
            "error",
            document,
            container.place(name),
            "bitsandbytes left vLLM 0.28; it needs vllm-bnb-plugin, which the image lacks",
            "an image with the plugin, or an AWQ or GPTQ checkpoint, which is faster too",
        )
    elif asked in (
        "awq",
        "gptq",
        "awq_marlin",
        "gptq_marlin",
        "compressed-tensors",
        "modelopt",
        "squeezellm",
        "marlin",
    ):
        yield Finding(
            "vllm-quantization",
            "warning",
            document,
            container.place(name),
            f"vLLM reads {asked} from the checkpoint; naming it only keeps the faster kernels from being chosen",
            "leave it out",
            without(container, name),
        )
    if container.flag("--dtype") in ("float16", "half") and (
        asked in ("awq", "gptq") or "awq" in model or "gptq" in model
    ):
        yield Finding(
            "vllm-dtype",
            "warning",
            document,
            container.place("--dtype"),
            "the checkpoint says its dtype; kernels of 4-bit weights take bfloat16 as well",
            "leave it out",
            without(container, "--dtype"),
        )


def _llama(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for container in _serving(document, "llama.cpp"):
        for flag, instead in _GONE_LLAMA.items():
            if flag in container.flags:
                yield Finding(
                    "llama-flag",
                    "error",
                    document,
                    container.place(flag),
                    f"llama-server has no {flag} any more",
                    instead,
                )
        layers = container.flag("--n-gpu-layers", "-ngl", "--gpu-layers")
        name = next((f for f in ("--n-gpu-layers", "-ngl", "--gpu-layers") if f in container.flags), "--n-gpu-layers")
        cpu_image = "llama.cpp:server" in container.image and "cuda" not in container.image
        if layers and layers not in ("0", "auto") and not container.gpus:
            yield Finding(
                "llama-gpu",
                "error",
                document,
                container.place(name),
                f"{layers} layers on a GPU, and the pod has none",
                "limits: nvidia.com/gpu: 1, or --n-gpu-layers 0",
            )
        if container.gpus and cpu_image and "rocm" not in container.image and "vulkan" not in container.image:
            yield Finding(
                "llama-gpu",
                "error",
                document,
                (*container.path, "image"),
                "a GPU is held, and this image computes on the CPU",
                "the tag server-cuda-bNNNN",
            )
        elif container.gpus and layers == "0":
            yield Finding(
                "llama-gpu",
                "error",
                document,
                container.place(name),
                "a GPU is held and not used",
                "leave --n-gpu-layers out (auto), or the GPU",
            )
        model = container.model
        if (
            model
            and not model.endswith(".gguf")
            and "--hf-repo" not in container.flags
            and "-hf" not in container.flags
        ):
            yield Finding(
                "llama-format",
                "error",
                document,
                container.place("--model"),
                f"{model} is no GGUF file",
                "a .gguf file: lowbit quantize MODEL --method q4_k_m",
            )
        monitored = any(other.kind == "ServiceMonitor" for other in documents)
        if monitored and "--metrics" not in container.flags:
            yield Finding(
                "llama-metrics",
                "error",
                document,
                container.path,
                "a ServiceMonitor asks for /metrics, which llama-server serves with --metrics only",
                "--metrics",
                (Change((*container.path, "args"), [*(container.content.get("args") or []), "--metrics"]),),
            )


def _tensorrt(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for container in _serving(document, "tensorrt-llm"):
        if container.model.endswith(".gguf"):
            yield Finding(
                "trtllm-format",
                "error",
                document,
                container.path,
                "TensorRT-LLM reads no GGUF",
                "a ModelOpt checkpoint: lowbit quantize MODEL --method fp8_static --format modelopt",
            )


def _serving(document: Document, runtime: str) -> list[Container]:
    return [container for pod in pods(document) for container in pod.containers if container.runtime == runtime]


def without(container: Container, flag: str) -> Sequence[Change]:
    """Changes that take a flag and its value out; () where it stands in a script."""
    place, value = container.flags[flag]
    key, index = place[-2], place[-1]
    words = container.content.get(str(key))
    if not isinstance(words, list) or not isinstance(index, int) or str(words[index]).split() != [str(words[index])]:
        return ()
    changes = [Change(place, REMOVE)]
    following: KeyPath = (*place[:-1], index + 1)
    separate = "=" not in str(words[index]) and value and index + 1 < len(words)
    if separate and flag not in _WITHOUT_VALUE:
        changes.append(Change(following, REMOVE))
    return tuple(changes)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


RULES = (_vllm, _llama, _tensorrt)
