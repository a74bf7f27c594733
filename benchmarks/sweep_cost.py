"""What a sweep of many methods costs against as many separate runs of `lowbit quantize` and `lowbit evaluate`, same settings.

    python benchmarks/sweep_cost.py MODEL --work DIR --data DIR --tasks hellaswag:50,mmlu_anatomy:20

Separate runs start each with an empty cache of results. Seconds are of whole processes, from start to end and of processor time
(which other work on the machine changes least). What was timed is kept in DIR, so that the same command continues after an
interruption; --steps N stops after N of them. The sweep is one step, timed from start to end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from _table import print_table

METHODS = "fp16,gptq,awq,int8_sq,fp8,nf4,q4_k_m,q3_k_s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--tasks", default="hellaswag:50,mmlu_anatomy:20")
    parser.add_argument("--num-samples", default="16")
    parser.add_argument("--seq-len", default="512")
    parser.add_argument("--windows", default="8")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=1000)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    file = asked.work / "seconds.json"
    known: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}
    methods = asked.methods.split(",")
    steps = [f"separate {method}" for method in methods] + ["sweep all"]
    for step in [step for step in steps if step not in known][: asked.steps]:
        kind, method = step.split()
        started, used = time.monotonic(), _processor_seconds()
        if kind == "separate":
            _separate(asked, method)
        else:
            _sweep(asked, methods)
        passed = {"seconds": time.monotonic() - started, "processor": _processor_seconds() - used}
        known[step] = {name: round(value, 1) for name, value in passed.items()}
        file.write_text(json.dumps(known, indent=1))
        print(f"{step}: {known[step]}", file=sys.stderr, flush=True)
    if all(step in known for step in steps):
        _print(known, methods)


def _print(known: dict[str, dict[str, float]], methods: list[str]) -> None:
    rows = [{"run": step.removesuffix(" all"), **seconds} for step, seconds in known.items()]
    separate = {
        unit: round(sum(known[f"separate {method}"][unit] for method in methods), 1) for unit in known["sweep all"]
    }
    print_table([*rows, {"run": "all that is separate", **separate}])
    for unit, seconds in known["sweep all"].items():
        print(f"\nthe sweep takes {seconds / separate[unit]:.0%} of the separate runs ({unit})")


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _separate(asked: argparse.Namespace, method: str) -> None:
    cache = asked.work / "cache-separate"
    shutil.rmtree(cache, ignore_errors=True)
    variables = _variables(cache)
    gguf = method[0] == "q" and method[1].isdigit()
    output = asked.work / (f"separate-{method}.gguf" if gguf else f"separate-{method}")
    _remove(output)
    calibration = ["--dataset", "pydoc", "--num-samples", asked.num_samples, "--seq-len", asked.seq_len]
    grouped = ["--group-size", "auto"] if method in ("gptq", "awq", "rtn") else []
    _lowbit(variables, "quantize", asked.model, "--method", method, *calibration, *grouped, "-o", output, "--quiet")
    _lowbit(variables, "evaluate", output, "--base", asked.model, "--tasks", f"{asked.tasks},kl", "--data", asked.data,
            "--windows", asked.windows, "--context", asked.seq_len, "--dtype", asked.dtype, "--quiet")  # fmt: skip


def _sweep(asked: argparse.Namespace, methods: list[str]) -> None:
    chosen = ",".join(methods)
    for begun in ("sweep", "cache-sweep"):
        shutil.rmtree(asked.work / begun, ignore_errors=True)
    _lowbit(_variables(asked.work / "cache-sweep"), "sweep", asked.model, "--methods", chosen, "-o", asked.work / "sweep",
            "--num-samples", asked.num_samples, "--seq-len", asked.seq_len, "--windows", asked.windows,
            "--no-speed", "--context", asked.seq_len, "--tasks", asked.tasks, "--data", asked.data,
            "--dtype", asked.dtype, "--quiet")  # fmt: skip


def _variables(cache: Path) -> dict[str, str]:
    """An environment with a cache of its own that shares the side environments of the usual one."""
    own = cache / "lowbit"
    own.mkdir(parents=True, exist_ok=True)
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit" / "envs"
    if not (own / "envs").exists():
        (own / "envs").symlink_to(usual)
    return {**os.environ, "XDG_CACHE_HOME": str(cache.absolute())}


def _lowbit(variables: dict[str, str], *arguments: object) -> None:
    script = Path(sys.executable).with_name("lowbit")
    done = subprocess.run([script, *map(str, arguments)], env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lowbit {' '.join(map(str, arguments))}: {done.stderr[-2000:]}")


def _remove(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    for file in output.parent.glob(f"{output.name.removesuffix('.gguf')}.*"):
        file.unlink()


if __name__ == "__main__":
    main()
