"""What `lowbit quantize --dry-run` prints for a GGUF file."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING

from lowbit.commands.progress import spoken

if TYPE_CHECKING:
    from rich.console import Console

    from lowbit.api.run import Settings
    from lowbit.pipeline.estimate import Estimate
    from lowbit.recipe import Recipe


def print_gguf_plan(model: str, recipe: Recipe, settings: Settings, *, as_json: bool) -> None:
    """Every tensor's type, the size of the file, and about what making it takes, without converting or reading a weight."""
    import torch

    from lowbit.api.memory import Model
    from lowbit.core.hardware import calibration_dtype, pick_device
    from lowbit.pipeline.estimate import this_machine

    opened = Model(model, revision=settings.revision)
    planned, size = opened.gguf_plan(recipe), opened.size(recipe)
    device = pick_device(settings.device)
    dtype = calibration_dtype(device, torch.float16)
    expected = opened.gguf_estimate(recipe, this_machine(device, dtype), dtype)
    if as_json:
        tensors = {one.name: {"shape": one.shape, "type": one.ggml_type, "bytes": one.nbytes} for one in planned}
        print(json.dumps({"bytes": size.file, "predicted_memory": expected.memory,
                          "predicted_seconds": round(expected.seconds, 1), "tensors": tensors,
                          "recipe": recipe.model_dump(mode="json")}, indent=2))  # fmt: skip
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
    if recipe.options.get("fit_types"):
        console.print("types are fitted when it runs, within this size (--no-fit-types: these types)")
    console.print(f"the file will take {size.file / 2**20:.1f} MiB, give or take some kilobytes of metadata")
    print_expected(console, expected)


def print_expected(console: Console, expected: Estimate) -> None:
    """The last line of every --dry-run."""
    console.print(
        f"quantizing it here would take about {spoken(expected.seconds)} and {expected.memory / 2**30:.1f} GiB of memory, "
        "verification apart; nothing was done (--dry-run)"
    )
