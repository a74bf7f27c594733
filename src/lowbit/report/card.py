"""The model card that goes with an artifact to the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def model_card(record: Mapping[str, Any]) -> str:
    """README.md for the hub: front matter, what was done, what was measured, how to use it."""
    recipe, base = record["recipe"], record["base"]
    name = str(base["name"])
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lowbit"]}
    if not name.startswith((".", "/")) and not name.endswith(".gguf") and name.count("/") <= 1:
        front |= {"base_model": name, "base_model_relation": "quantized"}
    quantization = (
        f"{recipe['method']}, {recipe['bits']} bits, "
        + (f"groups of {recipe['group_size']}" if recipe["group_size"] else "one scale per output channel")
        + (", symmetric" if recipe["symmetric"] else ", asymmetric")
    )
    if not record["layers"]:
        quantization = f"none (16-bit weights, {recipe['method']})"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {name.rstrip('/').rpartition('/')[2]}, {record['bits_per_weight']:.2f} bits per weight",
        "",
        f"Made from `{name}` with [lowbit](https://pypi.org/project/lowbit/) {record['lowbit']}.",
        "",
        "| | |",
        "|---|---|",
        f"| quantization | {quantization} |",
        f"| format | {recipe['format'] if record['layers'] else 'safetensors'} |",
        f"| size | {record['bytes'] / 2**20:,.0f} MiB (base {base['bytes'] / 2**20:,.0f} MiB) |",
        *_measured(record.get("verification")),
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(recipe, sort_keys=False).strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _measured(measured: Mapping[str, Any] | None) -> list[str]:
    if measured is None:
        return ["| measured | not verified (--no-verify) |"]
    return [
        f"| perplexity | {measured['perplexity']:.3f} ± {measured['perplexity_error']:.3f} "
        f"(base {measured['base_perplexity']:.3f}) |",
        f"| KL divergence from the base | {measured['kl']:.5f} ± {measured['kl_error']:.5f} nats |",
        f"| top-1 agreement | {measured['top1']:.1%} |",
        f"| measured on | {measured['windows']} held-out windows of {measured['context']} tokens |",
    ]
