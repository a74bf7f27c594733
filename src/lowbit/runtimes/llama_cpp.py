"""llama.cpp: GGUF files on CPUs and GPUs. `llama-server` where it is installed, else the one inside the package xllamacpp,
started by `lowbit.runtimes.llama_server` with the same flags.

Source of flags, endpoints and variables: llama.cpp, tools/server/README.md.
"""

from __future__ import annotations

from lowbit.runtimes.artifact import Artifact
from lowbit.runtimes.description import Runtime, ServeOptions, Support


def command(artifact: Artifact, options: ServeOptions) -> list[str]:
    """Flags of llama-server. Its --ctx-size is shared by all slots, so it is `context` for each.

    It would keep up to 8 GiB of finished prompts beside the slots' own; memory then grows for hours, past what was
    planned. `-- --cache-ram MIB` turns that on again.
    """
    argv = ["--model", artifact.location, "--alias", options.name or artifact.name]
    argv += ["--host", options.host, "--port", str(options.port), "--parallel", str(options.parallel), "--metrics"]
    argv += ["--cache-ram", "0"]
    if options.context is not None:
        argv += ["--ctx-size", str(options.context * options.parallel)]
    if options.threads is not None:
        argv += ["--threads", str(options.threads)]
    gpu_layers = "0" if options.device == "cpu" else options.gpu_layers
    return [*argv, "--n-gpu-layers", gpu_layers]


LLAMA_CPP = Runtime(
    name="llama.cpp",
    title="llama.cpp",
    supports=(Support(("gguf",), cpu=True, capability=50),),
    command=command,
    program=("llama-server",),
    missing="pip install 'lowbit[gguf]', which embeds llama.cpp, or install llama-server",
    port=8080,
    open_paths=("/health",),
    api_key_variable="LLAMA_API_KEY",
    images={"cpu": "ghcr.io/ggml-org/llama.cpp:server", "cuda": "ghcr.io/ggml-org/llama.cpp:server-cuda"},
    image_program=(),
    tested_version="xllamacpp 2026.10.11549",
)
