"""What an artifact takes: its weights and cache by size, and its speed and peak memory in a runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowbit.api.engines import IN_PROCESS, Answering
from lowbit.core.checkpoint import open_checkpoint
from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.evals.footprint import footprint
from lowbit.evals.probe import RUNTIMES as PROBED
from lowbit.evals.probe import probe, probe_endpoint


def weights_and_cache(artifact: str, config: Mapping[str, Any], context: int, batch: int) -> dict[str, Any]:
    """Bytes of the stored weights by part, and of the KV cache for `batch` sequences of `context` tokens."""
    if artifact.endswith(".gguf"):
        tensors = {name: tensor.nbytes for name, tensor in GgufSource(Path(artifact)).tensors.items()}
    else:
        tensors = {name: spec.nbytes for name, spec in open_checkpoint(artifact).tensors.items()}
    return footprint(tensors, config, context=context, batch=batch).to_dict()


def measured_speed(
    artifact: str,
    runtime: str,
    prompt: int,
    tokens: int,
    device: str,
    server: Callable[[int], AbstractContextManager[Answering]],
) -> dict[str, Any]:
    """Speed and peak memory on a prompt of `prompt` tokens and `tokens` more. server: starts what answers for the artifact,
    given the longest context, where that is no process of lowbit's own."""
    if runtime == IN_PROCESS and artifact.endswith(".gguf") and find_spec("xllamacpp") is not None:
        runtime = "llama.cpp"  # what such a file is made for; transformers would only dequantize it
    if runtime in PROBED:
        place = device if runtime == IN_PROCESS else "cpu"
        return probe(artifact, runtime, prompt=prompt, tokens=tokens, device=place)
    with server(prompt + tokens + 8) as answering:
        endpoint = answering.endpoint
        return probe_endpoint(endpoint.url, endpoint.model, prompt=prompt, tokens=tokens) | {"runtime": runtime}
