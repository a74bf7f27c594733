"""Does it fit: the context into the model, weights, cache and /dev/shm into the memory, numbers into the GPU.

What a manifest names tells the size only roughly ("Llama-2-7b-awq"), so these rules leave a margin and say that they
estimate. `lowbit deploy plan` and `lowbit recommend` compute from the model itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from lowbit.deploy.documents import Document
from lowbit.deploy.quantity import GIB, gibibytes
from lowbit.deploy.validate.finding import Change, Finding
from lowbit.deploy.validate.view import Container, at, mapping, pods

# positions of model families, by name; the first that fits counts
_CONTEXTS = (
    (r"llama-?2|codellama-?2|vicuna", 4096),
    (r"llama-?3\.[123]", 131072),
    (r"llama-?3", 8192),
    (r"codellama", 16384),
    (r"mistral-7b|mixtral-8x7b", 32768),
    (r"qwen-?2\.5", 32768),
    (r"qwen-?2", 32768),
    (r"qwen-?3", 40960),
    (r"phi-?3.*4k", 4096),
    (r"phi-?2", 2048),
    (r"gemma-?2", 8192),
    (r"gemma-?3", 131072),
    (r"tinyllama", 2048),
    (r"falcon", 2048),
    (r"opt-", 2048),
    (r"smollm2", 8192),
)
_BITS = (
    (r"q2_k", 3.0),
    (r"q3_k|iq3", 3.9),
    (r"q4_|iq4|w4a16|awq|gptq|int4|4bit|nf4|nvfp4|mxfp4", 4.8),
    (r"q5_", 5.7),
    (r"q6_k", 6.6),
    (r"q8_0|w8a8|int8|8bit|fp8", 8.5),
)
_GPUS = {  # words of node labels -> compute capability and GiB
    "v100": (7.0, 32),
    "t4": (7.5, 16),
    "a100": (8.0, 80),
    "a30": (8.0, 24),
    "a10g": (8.6, 24),
    "a10": (8.6, 24),
    "a40": (8.6, 48),
    "l40s": (8.9, 48),
    "l40": (8.9, 48),
    "l4": (8.9, 24),
    "h100": (9.0, 80),
    "h200": (9.0, 141),
    "b200": (10.0, 180),
    "p100": (6.0, 16),
    "p4": (6.1, 8),
    "rtx-3090": (8.6, 24),
    "rtx-4090": (8.9, 24),
}
_OWN = {"vllm": 6.0, "tensorrt-llm": 6.0, "transformers": 3.0, "llama.cpp": 0.3}  # GiB of the runtime's processes


def weights_of(name: str) -> float | None:
    """Bytes of a model's weights, by the name of its path: "Llama-2-7b-awq" -> 4.2e9. None where it tells nothing."""
    text = name.lower()
    experts = re.search(r"(\d+)x(\d+(?:\.\d+)?)b(?![a-z])", text)
    plain = re.search(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)(b|m)(?![a-z0-9])", text)
    if experts is None and plain is None:
        return None
    if experts is not None:
        count = int(experts[1]) * float(experts[2]) * 0.83e9
    else:
        assert plain is not None
        count = float(plain[1]) * (1e9 if plain[2] == "b" else 1e6)
    bits = next((bits for pattern, bits in _BITS if re.search(pattern, text)), 16.0)
    return count * bits / 8


def _context(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for container in _servers(document):
        name, given = next(
            (
                (flag, container.flags[flag][1])
                for flag in ("--max-model-len", "--ctx-size", "-c", "--max-seq-len")
                if flag in container.flags
            ),
            ("", ""),
        )
        tokens = _tokens(given)
        if name == "-c" and container.runtime != "llama.cpp":
            continue
        if container.runtime == "llama.cpp" and tokens:
            slots = container.flag("--parallel", "-np")
            tokens //= int(slots) if slots and slots.isdigit() else 1
        longest = next((n for pattern, n in _CONTEXTS if re.search(pattern, container.model.lower())), None)
        extended = "VLLM_ALLOW_LONG_MAX_MODEL_LEN" in container.env or any("rope" in flag for flag in container.flags)
        if (
            tokens
            and longest
            and tokens > longest
            and not extended
            and not re.search(r"\d+k\b", container.model.lower())
        ):
            yield Finding(
                "context",
                "error",
                document,
                container.place(name),
                f"{tokens} tokens, and a model of this family was made for {longest}: vLLM refuses, others babble",
                f"{name} {longest}",
            )


def _tokens(text: str) -> int | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text or "")
    if match is None:
        return None
    # vLLM reads k as 1000 and K as 1024
    return int(float(match[1]) * {"": 1, "k": 1000, "K": 1024, "m": 10**6, "M": 2**20}[match[2]])


def _memory(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for container in _servers(document):
        limit, weights = container.amount("limits", "memory"), weights_of(container.model)
        if limit is None or weights is None:
            continue
        shm = container.shm or 0.0
        cache = 0.0
        if not container.gpus:
            given = at(container.env.get("VLLM_CPU_KVCACHE_SPACE", (0, {}))[1], "value")
            cache = float(given) * GIB if str(given or "").isdigit() else 0.0
        # beside a GPU the files pass through the page cache, which is given up when memory is short
        held = weights * (0.25 if container.gpus and document.kind != "" else 1.0)
        need = held + shm + cache + _OWN[container.runtime] * GIB
        full = weights + shm + cache + _OWN[container.runtime] * GIB
        place = (*container.path, "resources", "limits", "memory")
        if need > limit:
            yield _too_small(document, place, limit, full, shm, weights, "error")
        elif container.gpus and full > limit:
            yield _too_small(document, place, limit, full, shm, weights, "warning")


def _too_small(
    document: Document,
    place: tuple[str | int, ...],
    limit: float,
    need: float,
    shm: float,
    weights: float,
    severity: str,
) -> Finding:
    share = f", {shm / GIB:.1f} GiB of /dev/shm" if shm else ""
    text = (
        f"about {need / GIB:.1f} GiB are needed (weights of {weights / GIB:.1f} GiB by the model's name{share}, and the "
        f"runtime), and the limit is {limit / GIB:.1f} GiB"
    )
    return Finding(
        "memory",
        "error" if severity == "error" else "warning",
        document,
        place,
        text,
        f"{gibibytes(need * 1.1)}, and the same as request",
        (Change(place, gibibytes(need * 1.1)), Change((*place[:-2], "requests", "memory"), gibibytes(need * 1.1))),
    )


def _gpu(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for container in _servers(document):
        known = _hardware(mapping(container.pod.spec.get("nodeSelector")))
        if known is None or not container.gpus:
            continue
        label, capability, memory = known
        text = f"{container.flag('--quantization', '-q') or ''} {container.model}".lower()
        place = (*container.pod.path, "nodeSelector")
        if "fp8" in text and capability < 8.9:
            strict = container.runtime == "tensorrt-llm" or capability < 7.5
            yield Finding(
                "fp8",
                "error" if strict else "warning",
                document,
                place,
                f"{label} has no FP8 units (compute capability {capability}, they came with 8.9)"
                + ("" if strict else ": vLLM keeps the weights in 8 bits and computes in 16, without the speed"),
                "an L4, L40S, H100 or newer; here w8a8 (INT8), AWQ or GPTQ",
            )
        if "nvfp4" in text and capability < 10:
            yield Finding(
                "fp8",
                "error" if container.runtime == "tensorrt-llm" else "warning",
                document,
                place,
                f"{label} has no NVFP4 units (compute capability {capability}, they came with 10.0)",
                "a Blackwell GPU; here FP8, AWQ or GPTQ",
            )
        if ("awq" in text or "w8a8" in text) and capability < 7.5 and container.runtime == "vllm":
            yield Finding(
                "fp8",
                "error",
                document,
                place,
                f"vLLM has no such kernels below 7.5, {label} has {capability}",
                "a T4 or newer, or GPTQ, or llama.cpp",
            )
        weights = weights_of(container.model)
        if weights is not None and weights > 0.95 * memory * GIB * container.gpus:
            yield Finding(
                "gpu-fit",
                "error",
                document,
                place,
                f"the weights take about {weights / GIB:.0f} GiB, and {container.gpus:g} x {label} have "
                f"{memory * container.gpus:g}",
                "more GPUs, or fewer bits: lowbit recommend",
            )


def _hardware(selector: Mapping[str, object]) -> tuple[str, float, int] | None:
    for key, value in selector.items():
        if "gpu" not in str(key).lower() and "accelerator" not in str(key).lower():
            continue
        words = re.split(r"[^a-z0-9]+", str(value).lower())
        for name, (capability, memory) in _GPUS.items():
            if name in words or ("-" in name and name in str(value).lower()):
                size = re.search(r"(\d+)gb", str(value).lower())
                return str(value), capability, int(size[1]) if size else memory
    return None


def _servers(document: Document) -> list[Container]:
    return [container for pod in pods(document) for container in pod.containers if container.runtime]


RULES = (_context, _memory, _gpu)
