"""TensorRT-LLM: ModelOpt's unified Hugging Face checkpoints on NVIDIA GPUs, by `trtllm-serve`.

Source: TensorRT-LLM, docs/source/features/quantization.md (hardware support) and docs/source/commands/trtllm-serve.
It was not run here: it needs an NVIDIA GPU and its own image.
"""

from __future__ import annotations

from lowbit.runtimes.artifact import Artifact
from lowbit.runtimes.description import Runtime, ServeOptions, Support


def command(artifact: Artifact, options: ServeOptions) -> list[str]:
    """Arguments of trtllm-serve. It names the model after its directory."""
    argv = ["serve", artifact.location, "--host", options.host, "--port", str(options.port)]
    argv += [
        "--max_batch_size",
        str(options.parallel),
        "--kv_cache_free_gpu_memory_fraction",
        f"{options.gpu_memory:g}",
    ]
    if options.context is not None:
        argv += ["--max_seq_len", str(options.context)]
    if options.tensor_parallel > 1:
        argv += ["--tp_size", str(options.tensor_parallel)]
    return argv


TENSORRT_LLM = Runtime(
    name="tensorrt-llm",
    title="TensorRT-LLM",
    supports=(
        Support(("dense",), capability=80),
        Support(("modelopt",), ("w4a16*",), capability=80),
        Support(("modelopt",), ("fp8*",), capability=89),
        Support(("modelopt",), ("nvfp4",), capability=100),
        Support(("fp8",), capability=89),
    ),
    command=command,
    program=("trtllm-serve",),
    missing="run the image nvcr.io/nvidia/tensorrt-llm/release, or pip install tensorrt-llm in an environment of its own "
    "on a machine with an NVIDIA GPU",
    metrics_path="/prometheus/metrics",
    open_paths=("/health", "/prometheus/metrics"),
    images={"cuda": "nvcr.io/nvidia/tensorrt-llm/release"},
)
