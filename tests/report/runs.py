"""Runs and records as lowbit writes them, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def task(score: float, base: float, verdict: str, metric: str = "acc") -> dict[str, Any]:
    against = {"n": 100, "difference": score - base, "low": score - base - 0.05, "high": score - base + 0.05,
               "p_value": 0.3, "flips": 0.04, "recovery": 100 * score / base, "verdict": verdict}  # fmt: skip
    return {"name": "hellaswag", "metric": metric, "higher_is_better": "perplexity" not in metric, "shots": 0, "n": 100,
            "score": score, "error": 0.05, "base_score": base, "against": against, "changed_answers": 0.1}  # fmt: skip


def write_artifact(
    folder: Path,
    method: str,
    size: int,
    kl: float,
    score: float,
    decode: float | None,
    verdict: str = "indistinguishable",
) -> Path:
    folder.mkdir()
    layers = {
        f"model.layers.{number}.{name}": {
            "scheme": {
                "name": "int4",
                "weights": {"bits": 4, "group_size": 64, "symmetric": True, "granularity": "group"},
            },
            "shape": [8, 8],
            "error": 0.001 * (number + 1) * kl,
        }
        for number in range(4)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    record = {
        "lowbit": "0.1.0", "recipe": {"method": method, "format": "compressed-tensors", "dtype": "auto"},
        "base": {"name": "org/base", "identity": "abc", "bytes": 400 * 2**20}, "calibration": None,
        "versions": {"torch": "2", "compute": "cpu float32"}, "bits_per_weight": 4.25, "bytes": size * 2**20,
        "layers": layers, "checksums": {}, "verification": None,
    }  # fmt: skip
    (folder / "lowbit.json").write_text(json.dumps(record))
    worst = {"kl": 4.6, "window": 0, "position": 3, "before": "<script>alert(1)</script> a", "token": "\n", "after": " b",
             "base_choice": "<b>", "base_probability": 0.5, "choice": " c", "probability": 0.25}  # fmt: skip
    run = {
        "lowbit": "0.1.0", "artifact": str(folder), "base": "org/base", "runtime": "transformers", "record": record,
        "text": {"dataset": "pydoc", "windows": 2, "context": 64, "perplexity": 15 + kl, "perplexity_error": 0.4,
                 "base_perplexity": 15.0, "kl": kl, "kl_error": kl / 9, "kl_p99": 5 * kl, "top1": 1 - kl,
                 "histogram": {"low": -8.0, "high": 2.0, "counts": [1] * 20 + [9] * 10 + [2] * 10}, "worst": [worst]},
        "tasks": {"hellaswag": task(score, 0.45, verdict)}, "verdict": verdict, "lm_eval": "0.4.13",
        "memory": {"weights": {"linears": size * 2**20}, "total": size * 2**20, "cache": 2**20},
        "speed": {"runtime": "transformers", "prefill_tokens_per_second": 100.0, "decode_tokens_per_second": decode,
                  "time_to_first_token": 0.5, "peak_memory": 2**30} if decode else {"runtime": "x", "error": "no"},
    }  # fmt: skip
    (folder / "lowbit-eval.json").write_text(json.dumps(run))
    return folder
