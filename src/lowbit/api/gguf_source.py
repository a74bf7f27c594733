"""From any checkpoint to an unquantized GGUF: llama.cpp's own converter, in its side environment."""

from __future__ import annotations

import subprocess
from pathlib import Path

from lowbit.core.checkpoint.gguf_source import GgufSource
from lowbit.core.contracts import Checkpoint
from lowbit.core.errors import CheckpointError, SideEnvironmentError
from lowbit.core.ggml_types import GGML_TYPES
from lowbit.core.progress import Progress
from lowbit.environments import child_variables, python_of

ENVIRONMENT = "gguf-convert"
_SOURCE = "source.gguf"
_FLOATS = ("F32", "F16", "BF16")
_OUT_TYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}


def converted(checkpoint: Checkpoint, work: Path, progress: Progress) -> GgufSource:
    """The checkpoint as GGUF in `work`, converted there unless an earlier run did it. Raises SideEnvironmentError when the
    converter is not installed or refuses the model."""
    target = work / _SOURCE
    if not target.is_file():
        progress.start("convert", 1)
        partial = work / "source.partial.gguf"
        stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
        _run_converter(checkpoint.location, partial, _OUT_TYPES.get(stored, "auto"))
        if not GgufSource(partial).tensors:
            partial.unlink()
            raise CheckpointError(
                f"llama.cpp's converter found no weights in {checkpoint.location}: it reads model*.safetensors only",
                hint="rename the files (and their names in model.safetensors.index.json)",
            )
        partial.replace(target)
        progress.advance()
    return GgufSource(target)


def drop_converted(work: Path) -> None:
    """Remove the intermediate file."""
    (work / _SOURCE).unlink(missing_ok=True)


def opened(file: Path, *, allow_requantize: bool) -> GgufSource:
    """A GGUF model as a source. Raises CheckpointError for one that is quantized, unless that is allowed."""
    source = GgufSource(file)
    if "general.architecture" not in source.metadata:
        raise CheckpointError(f"{file.name} holds no model: it names no architecture")
    quantized = sorted({tensor.ggml_type for tensor in source.tensors.values()} - set(_FLOATS))
    unknown = [name for name in quantized if name not in GGML_TYPES]
    if quantized and not allow_requantize:
        raise CheckpointError(
            f"{file.name} is quantized already ({', '.join(quantized)}); to do so again costs accuracy",
            hint="start from F16, BF16 or F32, or add --allow-requantize",
        )
    if unknown:
        raise CheckpointError(f"{file.name} has tensors of {', '.join(unknown)}, which lowbit does not write")
    return source


def _run_converter(model: Path, output: Path, out_type: str) -> None:
    command = [str(python_of(ENVIRONMENT)), "-m", "convert_hf_to_gguf", str(model)]
    done = subprocess.run(
        [*command, "--outfile", str(output), "--outtype", out_type],
        env=child_variables(None),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode == 0 and output.is_file():
        return
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    cause = lines[-1][:300] if lines else f"exit code {done.returncode}"
    output.unlink(missing_ok=True)
    raise SideEnvironmentError(
        f"llama.cpp's converter could not convert {model}: {cause}",
        hint=f"{' '.join(command)} --dry-run shows all it has to say",
    )
