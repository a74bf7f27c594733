"""transformers: every format that it loads, at the speed of plain PyTorch; and quantization while loading by bitsandbytes.

Started by `lowbit.runtimes.transformers_server`, around the library's own `transformers serve`, which knows neither API
keys nor settings of bitsandbytes other than NF4 with double quantization and LLM.int8().
"""

from __future__ import annotations

from lowbit.runtimes.artifact import Artifact
from lowbit.runtimes.bnb_variables import to_variables
from lowbit.runtimes.description import Runtime, ServeOptions, Support

_KERNELS = "gptqmodel"


def command(artifact: Artifact, options: ServeOptions) -> list[str]:
    """Arguments of our launcher."""
    argv = ["--model", artifact.location, "--name", options.name or artifact.name]
    argv += ["--host", options.host, "--port", str(options.port), "--device", options.device]
    if options.threads is not None:
        argv += ["--threads", str(options.threads)]
    if options.dtype is not None:
        argv += ["--dtype", options.dtype]
    return argv


def variables(artifact: Artifact, options: ServeOptions) -> dict[str, str]:
    """LOAD_IN_8BIT, LOAD_IN_4BIT, BNB_4BIT_...: the only way our launcher is told to quantize."""
    return to_variables(options.bitsandbytes)


TRANSFORMERS = Runtime(
    name="transformers",
    title="transformers",
    supports=(
        Support(("dense", "bitsandbytes", "bitsandbytes_double"), cpu=True, capability=60),
        Support(("compressed-tensors",), ("*asymmetric*",), refused="transformers 5.23 needs such weights dequantized"),
        Support(("compressed-tensors", "fp8"), cpu=True, capability=60),
        Support(("gptq", "gptq_v2", "awq"), cpu=True, capability=60, plugin=_KERNELS),
        Support(("gguf",), refused="transformers would dequantize a GGUF file while loading; serve it with llama.cpp"),
    ),
    command=command,
    program=("python", "-m", "lowbit.runtimes.transformers_server"),
    missing="pip install 'lowbit[serving]'",
    variables=variables,
    metrics_path=None,
    open_paths=("/health",),
    api_key_variable="LOWBIT_API_KEY",
    tested_version="5.23.0",
)
