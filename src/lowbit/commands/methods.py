"""lowbit methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.core.errors import CheckpointError

_FULL = 16.0
_BATCHES = ", also with large batches"
_EFFORT = {1: "no data", 2: "calibration", 3: "long calibration"}


def methods(
    measured: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Artifacts, or a folder of them: their numbers replace the general ones."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The method table: what each costs, what it gives, and where it runs.

    Example: lowbit methods --measured ./artifacts
    """
    table = method_table()
    for folder in measured or []:
        for name, numbers in measurements(folder).items():
            table[name] = {**table.get(name, {}), **numbers}
    if as_json:
        print(json.dumps(table, indent=2))
        return
    _print(table)


def method_table() -> dict[str, dict[str, Any]]:
    """Preset -> general numbers, from methods/table.yaml; compression and memory saved follow from the bits."""
    from importlib import resources

    import yaml

    table: dict[str, dict[str, Any]] = yaml.safe_load(
        resources.files("lowbit.methods").joinpath("table.yaml").read_text()
    )
    return {name: {**row, **_from_bits(row["bits"]), "measured": False} for name, row in table.items()}


def measurements(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows from the lowbit.json of an artifact, or of every artifact in a folder, by preset (else by directory).

    Raises CheckpointError when there is none.
    """
    files = [folder / "lowbit.json"] if (folder / "lowbit.json").is_file() else sorted(folder.glob("*/lowbit.json"))
    if not files:
        raise CheckpointError(f"{folder} holds no artifact: there is no lowbit.json in it or one level below")
    return {_row_name(json.loads(file.read_text())["recipe"], file.parent.name): _measured(file) for file in files}


def _measured(file: Path) -> dict[str, Any]:
    record = json.loads(file.read_text())
    row = {**_from_bits(record["bits_per_weight"]), "bits": round(record["bits_per_weight"], 3)}
    row |= {
        "bytes": record["bytes"],
        "formats": [record["recipe"]["format"]],
        "artifact": str(file.parent),
        "measured": True,
    }
    verified = record.get("verification") or {}
    if verified.get("base_perplexity"):
        row["loss"] = f"{100 * (verified['perplexity'] / verified['base_perplexity'] - 1):.2f}"
        row |= {"kl": verified["kl"], "top1": verified["top1"]}
    return row


def _row_name(recipe: dict[str, Any], directory: str) -> str:
    """The preset with the same numbers, method and transforms."""
    from lowbit.recipe import preset, preset_names

    decisive = ("method", "kind", "bits", "granularity", "activations", "symmetric")
    for name in preset_names():
        own = preset(name).model_dump(mode="json")
        same = all(own[field] == recipe.get(field) for field in decisive)
        if same and list(own["transforms"]) == list(recipe.get("transforms", {})):
            return name
    return directory


def _from_bits(bits: float) -> dict[str, Any]:
    return {"compression": f"{_FULL / bits:.2f}x", "memory_saved": f"{100 * (1 - bits / _FULL):.0f}%"}


def _print(table: dict[str, dict[str, Any]]) -> None:
    """Three tables that 80 columns hold."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 80)
    what = _table("method", "what", "effort")
    gives = _table("method", "loss %", "smaller", "memory saved", "speed")
    runs = _table("method", "formats", "runtimes", "hardware")
    for name, row in table.items():
        marked = f"{name} *" if row["measured"] else name
        loss = f"{row['loss']} (KL {row['kl']:.4f})" if "kl" in row else row.get("loss", "-")
        speed = row.get("speed", "-").replace(_BATCHES, " +")
        what.add_row(marked, row.get("what", "-"), _EFFORT.get(row.get("complexity", 0), "-"))
        gives.add_row(marked, loss, row["compression"], row["memory_saved"], speed)
        runs.add_row(
            marked, ", ".join(row["formats"]), ", ".join(row.get("runtimes", [])) or "-", row.get("hardware", "-")
        )
    for part in (what, gives, runs):
        console.print(part)
    measured = any(row["measured"] for row in table.values())
    note = "* measured." if measured else "Rules of thumb for 7B and up, not measurements; --measured DIR shows yours."
    console.print(f"loss: rise of perplexity against 16 bits. speed: of decoding; +: also with large batches. {note}")


def _table(*headings: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", row_styles=["", "dim"], pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, no_wrap=number == 0, overflow="fold")
    return table
