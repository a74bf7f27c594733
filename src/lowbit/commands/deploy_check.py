"""lowbit deploy validate, migrate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

Paths = Annotated[list[Path], typer.Argument(metavar="PATH...", help="YAML files, folders, Kustomize trees, charts.")]


def validate(
    paths: Paths,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what is mechanical, in place (comments are lost).")] = False,
    kubernetes: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Version whose schema is asked, such as 1.37.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find what is wrong with manifests that quantize or serve models: where, why, and what mends it.

    Exits with 3 when there is an error. Schemas are used as well where the package kubernetes-validate is installed.

    Examples:

    lowbit deploy validate deploy/kustomize/overlays/prod

    lowbit deploy validate old.yaml --fix
    """
    from lowbit.deploy.documents import read_documents
    from lowbit.deploy.validate import validate as check
    from lowbit.deploy.validate.fix import fixed, write_back

    documents = read_documents(paths)
    found = check(documents, kubernetes)
    if fix and any(finding.changes for finding in found):
        mended = fixed(documents, found)
        for file in write_back(mended):
            typer.echo(f"mended {file}", err=True)
        documents = read_documents(paths)
        found = check(documents, kubernetes)
    errors = sum(finding.severity == "error" for finding in found)
    if as_json:
        print(json.dumps({"documents": len(documents), "findings": [finding.to_dict() for finding in found]}, indent=2))
    else:
        for finding in found:
            print(f"{finding.document.file}:{finding.line}: {finding.severity} [{finding.rule}] {finding.where}")
            print(f"    {finding.message}")
            print(f"    mend: {finding.mend}{'  (--fix)' if finding.changes else ''}")
        print(f"{len(documents)} documents: {errors} errors, {len(found) - errors} warnings")
    if errors or (strict and found):
        raise typer.Exit(3)


def migrate(
    paths: Paths,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")] = Path("migrated"),
    model: Annotated[str | None, typer.Option(help="Path of the model in its claim, where none is named.")] = None,
    image: Annotated[
        str | None, typer.Option(metavar="REPOSITORY:TAG", help="lowbit's image in your registry.")
    ] = None,
) -> None:
    """Explain what is wrong with old manifests and write their modern equivalents with the same intent.

    Knows AutoGPTQ Jobs, AutoAWQ scripts, vLLM and llama.cpp Deployments, TensorRT-LLM's quantize.py and the variables of
    bitsandbytes.

    Example: lowbit deploy migrate old.yaml -o new
    """
    from lowbit.api.deploy import write
    from lowbit.api.deploy_migrate import migrate as renew
    from lowbit.deploy.documents import read_documents
    from lowbit.deploy.validate import validate as check

    documents = read_documents(paths)
    made = renew(documents, model=model, image=image)
    findings = check(documents)
    files = {f"{each.name}/{name}": text for each in made for name, text in each.files.items()}
    write(files, output)
    for each in made:
        old = f"{each.document.kind or 'variables'} {each.document.name}".strip()
        print(f"{old} ({each.document.file}:{each.document.line(())}) -> {output / each.name}")
        for finding in findings:
            if finding.document.place == each.document.place:
                print(f"  {finding.severity}: {finding.message}")
        for note in each.notes:
            print(f"  now: {note}")
    print(f"next: lowbit deploy validate {output}/{made[0].name}/kustomize/overlays/prod")
