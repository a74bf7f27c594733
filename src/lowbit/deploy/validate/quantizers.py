"""Quantizing as it was written years ago: packages that are archived, commands that never were, variables nobody reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lowbit.deploy.documents import Document
from lowbit.deploy.validate.finding import REMOVE, Change, Finding
from lowbit.deploy.validate.view import Container, items, mapping, pods

_BOOLEANS = ("true", "1", "yes", "on", "false", "0", "no", "off", "")
_BNB = ("LOAD_IN_8BIT", "LOAD_IN_4BIT", "BNB_4BIT_COMPUTE_DTYPE", "BNB_4BIT_QUANT_TYPE", "BNB_4BIT_USE_DOUBLE_QUANT")
_MIGRATE = "lowbit deploy migrate FILE writes the modern equivalent"


def _gptq(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for container in _containers(document):
        if not re.search(r"auto_gptq|autogptq", container.line):
            continue
        place = container.words[0][0] if container.words else container.path
        yield Finding(
            "autogptq",
            "error",
            document,
            place,
            "AutoGPTQ is archived and never had a command line: `python -m auto_gptq.quantize` ends with "
            "No module named auto_gptq.quantize",
            _MIGRATE,
        )
        if re.match(r"(docker\.io/)?pytorch/pytorch:", container.image):
            yield Finding(
                "image-lacks",
                "error",
                document,
                (*container.path, "image"),
                "the image holds PyTorch alone: neither auto_gptq nor transformers nor datasets",
                _MIGRATE,
            )
        if (container.flag("--desc-act") or "").lower() == "true":
            yield Finding(
                "desc-act",
                "error",
                document,
                container.place("--desc-act"),
                "vLLM refuses desc_act checkpoints since 0.32, and they are slow elsewhere",
                "--act-order static: the accuracy of desc_act, loadable everywhere",
            )
        if container.flag("--dataset") == "c4":
            yield Finding(
                "hub-in-job",
                "warning",
                document,
                container.place("--dataset"),
                "c4 is downloaded while the GPU waits, and the cache is lost with the pod",
                "a file on the model's volume, or HF_HOME on a volume",
            )


def _awq(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    if document.kind != "ConfigMap":
        return
    mounted = {
        volume.get("configMap", {}).get("name")
        for other in documents
        for pod in pods(other)
        for volume in items(pod.spec.get("volumes"))
        if isinstance(volume.get("configMap"), dict)
    }
    for key, text in mapping(document.content.get("data")).items():
        if not isinstance(text, str) or not re.search(r"from awq import|import awq|AutoAWQForCausalLM", text):
            continue
        place = ("data", str(key))
        yield Finding(
            "autoawq",
            "error",
            document,
            place,
            "AutoAWQ is archived (May 2025): it does not run with today's transformers and torch",
            _MIGRATE,
        )
        if document.name not in mounted:
            yield Finding(
                "script-alone",
                "error",
                document,
                place,
                "nothing runs this script: no Job here mounts the ConfigMap",
                _MIGRATE,
            )
        if "save_quantized(" in text and not re.search(r"rename|replace\(", text):
            yield Finding(
                "half-written",
                "warning",
                document,
                place,
                "a pod that dies while saving leaves half a model under its final name",
                "write to a temporary directory and rename it, as lowbit does",
            )


def _tensorrt(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for container in _containers(document):
        script = next(
            (p for p, word in container.words if re.search(r"examples/quantization/quantize\.py", word)), None
        )
        if script is None:
            continue
        if "tritonserver" in container.image:
            yield Finding(
                "image-lacks",
                "error",
                document,
                (*container.path, "image"),
                "Triton's image holds the runtime: TensorRT-LLM's examples are not in it, so the script is not found",
                _MIGRATE,
            )
        kind = container.flag("--qformat") or ""
        if kind.startswith("int8_sq"):
            yield Finding(
                "int8-sq",
                "error",
                document,
                container.place("--qformat"),
                "int8_sq gives a checkpoint for TensorRT engines, which TensorRT-LLM 1.x dropped for PyTorch; that reads "
                "FP8, NVFP4 and INT4 (AWQ) of a unified checkpoint",
                "INT8 with SmoothQuant for vLLM (lowbit quantize --method int8_sq), or FP8 for TensorRT-LLM",
            )
        folders = [value for flag in ("--model-dir", "--output-dir") if (value := container.flag(flag))]
        paths = [str(mount.get("mountPath")) for mount in container.mounts]
        for folder in folders:
            if not any(folder.startswith(path.rstrip("/") + "/") for path in paths):
                yield Finding(
                    "no-volume",
                    "error",
                    document,
                    container.path,
                    f"{folder} is on no volume: nothing is read from it, and what is written is lost with the pod",
                    _MIGRATE,
                )


def _variables(document: Document, documents: Sequence[Document]) -> Iterator[Finding]:
    for pod in pods(document):
        for container in pod.containers:
            given = {name: container.env[name] for name in _BNB if name in container.env}
            if not given:
                continue
            read = "lowbit.runtimes.transformers_server" in container.line
            number, _ = next(iter(given.values()))
            place = (*container.path, "env", number)
            if not read:
                yield Finding(
                    "bnb-unread",
                    "error",
                    document,
                    place,
                    f"no library reads {', '.join(given)}: the model is served unquantized, and nobody is told",
                    "lowbit deploy serve MODEL --runtime transformers --load-in nf4, whose launcher reads them",
                )
            yield from _values(container, given)


def _values(container: Container, given: dict[str, tuple[int, dict[str, object]]]) -> Iterator[Finding]:
    document = container.document
    values = {name: str(entry.get("value", "")).strip().lower() for name, (_, entry) in given.items()}
    for name in ("LOAD_IN_8BIT", "LOAD_IN_4BIT", "BNB_4BIT_USE_DOUBLE_QUANT"):
        if values.get(name, "") not in _BOOLEANS:
            yield Finding(
                "bnb-value",
                "error",
                document,
                (*container.path, "env", given[name][0], "value"),
                f"{name}={values[name]!r} is neither true nor false",
                '"true" or "false"',
            )
    yes = [name for name in ("LOAD_IN_8BIT", "LOAD_IN_4BIT") if values.get(name) in ("true", "1", "yes", "on")]
    if len(yes) == 2:
        number = given["LOAD_IN_8BIT"][0]
        yield Finding(
            "bnb-both",
            "error",
            document,
            (*container.path, "env", number),
            "8 and 4 bits are both asked for",
            "one of them: 4 bits with nf4 takes half the memory",
            (Change((*container.path, "env", number), REMOVE),),
        )
    for name, known in (
        ("BNB_4BIT_QUANT_TYPE", ("nf4", "fp4", "")),
        ("BNB_4BIT_COMPUTE_DTYPE", ("bfloat16", "float16", "float32", "")),
    ):
        if values.get(name, "") not in known:
            yield Finding(
                "bnb-value",
                "error",
                document,
                (*container.path, "env", given[name][0], "value"),
                f"{name}={values[name]!r} is unknown",
                f"one of {', '.join(filter(None, known))}",
            )


def _containers(document: Document) -> list[Container]:
    return [container for pod in pods(document) for container in pod.every_container]


RULES = (_gptq, _awq, _tensorrt, _variables)
