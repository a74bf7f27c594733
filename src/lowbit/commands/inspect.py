"""lowbit inspect."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.core.errors import CheckpointError


def inspect(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A directory made by lowbit quantize, or a .gguf file.")
    ],
    layers: Annotated[bool, typer.Option("--layers", help="Every layer, not only the ten worst.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Read the weights and compare their checksums.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Recipe, sizes by scheme, per-layer errors, checksums and provenance of an artifact; or a GGUF file, any GGUF file:
    types by tensor, bits per weight, metadata and chat template.

    Example: lowbit inspect model-w4 --check
    """
    if artifact.suffix == ".gguf":
        from lowbit.commands.gguf_inspect import inspect_gguf

        inspect_gguf(artifact, layers=layers, check=check, as_json=as_json)
        return
    if not artifact.exists():
        raise CheckpointError(f"{artifact} does not exist")
    file = artifact / "lowbit.json"
    if not file.is_file():
        raise CheckpointError(
            f"{artifact} is no lowbit artifact: it has no lowbit.json", hint="lowbit quantize makes one"
        )
    record = json.loads(file.read_text())
    changed = _changed(artifact, record) if check else None
    if as_json:
        print(json.dumps({**record, **({} if changed is None else {"changed_files": changed})}, indent=2))
    else:
        _print(record, layers, changed)
    if changed:
        raise CheckpointError(f"{', '.join(changed)} differ from their checksums", hint="copy or quantize it again")


def _changed(artifact: Path, record: dict[str, Any]) -> list[str]:
    from lowbit.api.record import verify_checksums

    return verify_checksums(artifact, record)


def _print(record: dict[str, Any], every: bool, changed: list[str] | None) -> None:
    import yaml
    from rich.console import Console
    from rich.table import Table

    console = Console()
    base = record["base"]
    console.print(f"base       {base['name']} ({base['model_type']}, {base['bytes'] / 2**20:.1f} MiB)")
    console.print(
        f"made by    lowbit {record['lowbit']}, torch {record['versions']['torch']}, {record['versions']['compute']}"
    )
    console.print(
        f"size       {record['bytes'] / 2**20:.1f} MiB, {record['bits_per_weight']:.3f} bits per quantized weight"
    )
    schemes = Counter(layer["scheme"]["name"] for layer in record["layers"].values())
    for name, count in schemes.most_common():
        console.print(f"scheme     {name}: {count} layers")
    measured = record.get("verification")
    if measured:
        console.print(f"verified   KL {measured['kl']:.5f} ± {measured['kl_error']:.5f} nats, top-1 {measured['top1']:.1%}, "
                      f"perplexity {measured['perplexity']:.3f} (base {measured['base_perplexity']:.3f})")  # fmt: skip
    else:
        console.print("verified   no (--no-verify)")
    if record["calibration"]:
        console.print(f"calibrated on windows {record['calibration']['windows_sha256'][:16]}")
    for name, digest in record["checksums"].items():
        state = "" if changed is None else ("  CHANGED" if name in changed else "  ok")
        console.print(f"sha256     {digest[:16]}  {name}{state}")
    console.print("recipe")
    console.print(yaml.safe_dump(record["recipe"], sort_keys=False).strip(), style="dim", highlight=False)
    errors = sorted(record["layers"].items(), key=lambda item: -(item[1]["error"] or 0))
    table = Table("layer", "numbers", "relative error", "notes", header_style="bold")
    for path, layer in record["layers"].items() if every else errors[:10]:
        table.add_row(path, layer["scheme"]["name"], f"{layer['error']:.5f}", "; ".join(layer.get("notes", [])))
    if errors:
        console.print("layers" if every else "worst layers (--layers shows all)")
        console.print(table)
