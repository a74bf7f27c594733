"""lowbit recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The recipes that lowbit carries.")


@app.command("list")
def list_recipes(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Names of all presets, each with its first line.

    Example: lowbit recipe list
    """
    from importlib import resources

    from lowbit.recipe import preset_names

    said = {
        name: resources.files("lowbit.presets").joinpath(f"{name}.yaml").read_text().splitlines()[0].lstrip("# ")
        for name in preset_names()
    }
    if as_json:
        print(json.dumps(said, indent=2))
        return
    for name, line in said.items():
        print(f"{name:8} {line}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A preset, as `lowbit recipe list` shows them, or a GGUF type.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a preset in full, as YAML to start from.

    Example: lowbit recipe show gptq > recipe.yaml
    """
    from lowbit.api.gguf_options import spelled_out
    from lowbit.api.quantize import recipe_for

    recipe = spelled_out(recipe_for(name))
    print(
        json.dumps(recipe.model_dump(mode="json"), indent=2) if as_json else recipe.yaml(), end="\n" if as_json else ""
    )


@app.command("import")
def import_recipe(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="A recipe of another tool, or a ModelOpt qformat name.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it here.")] = None,
) -> None:
    """Turn another tool's recipe into ours, and say what has no counterpart.

    AutoGPTQ's quantize_config.json, AutoAWQ's quant_config, llm-compressor's recipe.yaml, a config.json with a
    quantization_config of these, or a ModelOpt qformat such as int4_awq.

    Example: lowbit recipe import quantize_config.json > recipe.yaml
    """
    from lowbit.api.recipe_import import import_recipe as run

    imported = run(source)
    for note in imported.notes:
        print(f"note: {note}", file=sys.stderr)
    text = f"# from {imported.tool}\n{imported.recipe.yaml()}"
    if output is None:
        print(text, end="")
    else:
        output.write_text(text)
