"""`lowbit fit --format compressed-tensors` beside GPTQ in groups of one size: bytes, predicted and measured divergence.

    .venv/bin/python benchmarks/fit_mixture.py --model DIR --text FILE --evaluate FILE [--out DIR]

The mixture is at most as large as GPTQ in groups of 32. Predictions are those that `lowbit fit --json` gives as `like`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _table import print_table

from lowbit.api.evaluate import evaluate
from lowbit.api.fit_layers import fit_layers
from lowbit.api.quantize import plan, quantize, recipe_for
from lowbit.api.run import Settings
from lowbit.recipe import Calibration, Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--evaluate", type=Path, required=True, help="text to measure on")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("fit-mixture"))
    args = parser.parse_args()
    text = Calibration(dataset=str(args.text), num_samples=args.samples, seq_len=args.seq_len)
    usual = recipe_for("gptq").updated(**text.model_dump())
    small = usual.updated(group_size=32)
    found = fit_layers(args.model, size=plan(args.model, recipe=small)[0].nbytes, calibration=text)
    rows = [
        row(args, "fit", found.recipe, found.nbytes, found.kl),
        row(args, "4 bits g64", usual.updated(group_size=64), *found.like["4 bits g64"]),
        row(args, "4 bits g32", small, *found.like["4 bits g32"]),
    ]
    kinds = list(found.types.values())
    print_table(rows)
    print("fit:", ", ".join(f"{kinds.count(kind)} layers in {kind}" for kind in sorted(set(kinds))))


def row(args: argparse.Namespace, name: str, recipe: Recipe, nbytes: int, predicted: float) -> dict[str, object]:
    output = args.out / name.replace(" ", "-")
    quantize(args.model, output=output, recipe=recipe, settings=Settings(verify=False, restart=True))
    measured = evaluate(output, base=args.model, dataset=str(args.evaluate), windows=args.windows, context=1024)
    kl = f"{measured.kl:.4f} ± {measured.kl_error:.4f}"
    return {"numbers": name, "bytes": nbytes, "predicted KL": f"{predicted:.4f}", "measured KL": kl}


if __name__ == "__main__":
    main()
