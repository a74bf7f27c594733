"""What a runtime is to the rest of lowbit: data, and two functions that turn an artifact and options into a command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from lowbit.runtimes.artifact import Artifact


@dataclass(frozen=True)
class BitsAndBytes:
    """Quantization while loading, by bitsandbytes. bits: 8 (LLM.int8()) or 4. The rest is for 4 bits."""

    bits: int
    quant_type: str = "nf4"
    compute_dtype: str = "bfloat16"
    double_quant: bool = False


@dataclass(frozen=True)
class ServeOptions:
    """What is asked of a server, in words that every runtime translates into its own flags.

    host, port: where it listens. name: what clients call the model; None takes the artifact's. context: tokens of one
    sequence, prompt and answer; None leaves it to the runtime. parallel: sequences at once. threads: CPU threads; None
    leaves it to the runtime. device: "cpu" or "cuda". gpu_layers: llama.cpp's, "auto" or a number. gpu_memory: share of
    the GPU's memory for vLLM and TensorRT-LLM. tensor_parallel: GPUs that share the model. cache_gib: KV cache of vLLM on
    a CPU, in GiB; 0 is 1. dtype: of unquantized tensors; None is the artifact's. bitsandbytes: quantize while loading
    (transformers only). drain: seconds to finish running requests after SIGTERM. extra: appended as it is.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    context: int | None = None
    parallel: int = 4
    threads: int | None = None
    device: str = "cpu"
    gpu_layers: str = "auto"
    gpu_memory: float = 0.9
    tensor_parallel: int = 1
    cache_gib: int = 0
    dtype: str | None = None
    bitsandbytes: BitsAndBytes | None = None
    drain: int = 30
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Support:
    """What a runtime can do with one kind of artifact. The first row that matches counts.

    formats: names of formats. numbers: patterns (`*`) over the labels of an artifact's schemes (see artifact.label).
    cpu: it runs without a GPU. capability: lowest CUDA compute capability, times ten; None: not on NVIDIA GPUs.
    below: first capability that it does not run on any more. plugin: a package that the runtime needs for it.
    cpu_dtype: what unquantized tensors have to be converted to on a CPU, where its kernels exist for one dtype only.
    refused: it cannot be served at all, and why, with what would do instead.
    """

    formats: tuple[str, ...]
    numbers: tuple[str, ...] = ("*",)
    cpu: bool = False
    capability: int | None = None
    below: int | None = None
    plugin: str | None = None
    cpu_dtype: str | None = None
    refused: str | None = None

    def covers(self, format: str, label: str) -> bool:
        """Whether this row speaks of such a layer."""
        return format in self.formats and any(fnmatchcase(label, pattern) for pattern in self.numbers)


@dataclass(frozen=True)
class Runtime:
    """A server of language models with an OpenAI-compatible interface.

    port: its own default. health_path, metrics_path (None: it has none), open without a key as far as `open_paths` says.
    images: container images by device ("cpu", "cuda"), without a tag; pin one. api_key_variable: the environment
    variable that it takes its key from; None: it knows no keys. program: what starts it where it is installed, and in
    its image unless `image_program` says otherwise (() for an image whose entry point is the program).
    environments: side environments of lowbit that hold it, by device. missing: how to get it.
    command: artifact, options -> the arguments behind the program; the same function for a local process and for a
    container, whose artifact has the path inside it. variables: environment variables that go with them.
    """

    name: str
    title: str
    supports: tuple[Support, ...]
    command: Callable[[Artifact, ServeOptions], list[str]]
    program: tuple[str, ...]
    missing: str
    variables: Callable[[Artifact, ServeOptions], dict[str, str]] = lambda artifact, options: {}
    port: int = 8000
    health_path: str = "/health"
    metrics_path: str | None = "/metrics"
    open_paths: tuple[str, ...] = ("/health",)
    api_key_variable: str | None = None
    images: Mapping[str, str] = field(default_factory=dict)
    image_program: tuple[str, ...] | None = None
    environments: Mapping[str, str] = field(default_factory=dict)
    tested_version: str = ""

    def argv(self, artifact: Artifact, options: ServeOptions, program: tuple[str, ...] | None = None) -> list[str]:
        """The whole command line. program: what to start instead of `self.program`."""
        return [*(self.program if program is None else program), *self.command(artifact, options), *options.extra]

    def support(self, format: str, label: str) -> Support | None:
        """The row for such layers; None when the runtime knows nothing of them."""
        return next((row for row in self.supports if row.covers(format, label)), None)
