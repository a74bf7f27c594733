"""What the Job's container runs: one run of `lowbit quantize`, chosen by the pod's index, safe to start again.

    python -m lowbit.deploy.job_entry --model /models/llama --recipes /recipes --output /output -- --device cuda

Recipe and place come from INDEX.yaml and INDEX.output in the folder of recipes; the index is --index, else
JOB_COMPLETION_INDEX, which Kubernetes sets in Indexed Jobs, else 0. torchrun starts it once for every process of a
run. A result that is there already, by the same recipe, is a success: a pod can be lost after the last rename.
SIGTERM ends it at once, which process 1 of a container would ignore without a handler; the journal on the output
volume lets the next pod go on. Exit codes are those of `lowbit`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import yaml


def main() -> None:
    """Entry point."""
    own, further = _split(sys.argv[1:])
    arguments = _parser().parse_args(own)
    index = arguments.index or os.environ.get("JOB_COMPLETION_INDEX", "0")
    recipe = arguments.recipes / f"{index}.yaml"
    named = arguments.recipes / f"{index}.output"
    if not (recipe.is_file() and named.is_file()):
        print(f"error: {recipe} or {named.name} is missing\nhint: mount the ConfigMap there", file=sys.stderr)
        sys.exit(2)
    output = arguments.output / named.read_text().strip()
    if is_done(output, recipe):
        print(f"{output} is there already, by the same recipe: nothing to do", file=sys.stderr)
        return
    program = [sys.executable, "-m", "lowbit", "quantize"]
    child = subprocess.Popen([*program, arguments.model, "--recipe", str(recipe), "-o", str(output), *further])

    def end(number: int, frame: FrameType | None) -> None:
        child.terminate()

    signal.signal(signal.SIGTERM, end)
    code = child.wait()
    sys.exit(code if code >= 0 else 128 - code)


def is_done(output: Path, recipe: Path) -> bool:
    """Whether `output` (a directory or .gguf file) was made by this very recipe."""
    record = output / "lowbit.json" if output.suffix != ".gguf" else output.with_suffix(".lowbit.json")
    if not (output.exists() and record.is_file()):
        return False
    from lowbit.recipe import Recipe

    made = json.loads(record.read_text())["recipe"]
    return bool(made == Recipe.parse(yaml.safe_load(recipe.read_text())).model_dump(mode="json"))


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint or hub id")
    parser.add_argument("--recipes", required=True, type=Path, help="folder of INDEX.yaml and INDEX.output")
    parser.add_argument("--output", required=True, type=Path, help="volume of artifacts")
    parser.add_argument("--index", help="which of the recipes, whatever the pod's own index is")
    return parser


if __name__ == "__main__":
    main()
