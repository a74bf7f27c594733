"""lowbit check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.core.errors import VerificationError

if TYPE_CHECKING:
    from lowbit.api.check import CheckReport


def check(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="Artifact, checkpoint directory or .gguf file.")],
    runtime: Annotated[
        str | None, typer.Option(help="llama.cpp, vllm, transformers or tensorrt-llm.", show_default="what suits best")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    python: Annotated[
        Path | None, typer.Option("--python", "--program", metavar="PATH", help="As in lowbit serve.")
    ] = None,
    patience: Annotated[float, typer.Option(help="Seconds to wait for the first completion.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Serve an artifact, ask it a few questions, and hold the answers against its dequantized weights. Exit code 3: failed.

    Example: lowbit check llama-w4 --runtime vllm
    """
    run_check(artifact, runtime=runtime, device=device, program=python, patience=patience, as_json=as_json, quiet=quiet)


def run_check(
    artifact: str,
    *,
    runtime: str | None = None,
    device: str = "auto",
    program: Path | None = None,
    patience: float = 600.0,
    as_json: bool = False,
    quiet: bool = False,
) -> None:
    """The check with its output. Raises VerificationError when it is not passed."""
    from lowbit.api.check import check as run
    from lowbit.commands.progress import listener

    with listener(quiet=quiet or as_json) as progress:
        report = run(artifact, runtime=runtime, device=device, program=program, patience=patience, progress=progress)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)
    failed = [finding.name for finding in report.findings if not finding.ok]
    if failed:
        raise VerificationError(
            f"{artifact} in {report.runtime} is not as it should be: {', '.join(failed)}",
            hint="lowbit inspect --check, another --runtime, or lowbit serve to see what it says",
        )


def _print(report: CheckReport) -> None:
    for finding in report.findings:
        print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:<18} {finding.detail}")

    print(f"{report.artifact} in {report.runtime}: {'passed' if report.passed else 'not passed'}")
