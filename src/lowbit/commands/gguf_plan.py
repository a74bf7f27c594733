"""What `lowbit quantize --dry-run` prints for a GGUF file."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.recipe import Recipe


def print_gguf_plan(model: str, recipe: Recipe, revision: str | None, *, as_json: bool) -> None:
    """Every tensor's type and the size of the file, without converting or reading a weight."""
    from lowbit.api.memory import Model

    opened = Model(model, revision=revision)
    planned, size = opened.gguf_plan(recipe), opened.size(recipe)
    if as_json:
        tensors = {one.name: {"shape": one.shape, "type": one.ggml_type, "bytes": one.nbytes} for one in planned}
        print(json.dumps({"bytes": size.file, "tensors": tensors, "recipe": recipe.model_dump(mode="json")}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for one in planned:
        parts = one.name.split(".")
        kinds[".".join(parts[2:]) if parts[0] == "blk" else one.name, one.ggml_type].append(one.nbytes)
    table = Table("tensor", "type", "tensors", "MiB", header_style="bold")
    for (name, kind), sizes in kinds.items():
        table.add_row(name, kind, str(len(sizes)), f"{sum(sizes) / 2**20:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"the file will take {size.file / 2**20:.1f} MiB, give or take some kilobytes of metadata; nothing was done (--dry-run)"
    )
