"""llm-compressor: one call for all its methods."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import Measured, windows
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def weight_groups(args: argparse.Namespace, activations: dict[str, Any] | None = None) -> dict[str, Any]:
    """The `config_groups` of the asked integer scheme."""
    weights: dict[str, Any] = {"num_bits": args.bits, "type": "int", "symmetric": args.sym, "strategy": "channel"}
    if args.group_size:
        weights |= {"strategy": "group", "group_size": args.group_size}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if activations:
        group["input_activations"] = activations
    return {"group_0": group}


def run(args: argparse.Namespace, recipe: list[Any]) -> None:
    """Quantize and save in compressed-tensors format."""
    torch.set_num_threads(args.threads)
    rows = windows(args)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    with Measured("llmcompressor", "compressed-tensors"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
        oneshot(
            model=model,
            recipe=recipe,
            dataset=data,
            num_calibration_samples=len(rows),
            max_seq_length=args.seq_len,
            shuffle_calibration_samples=False,
        )
        wanted = AutoConfig.from_pretrained(args.model).dtype
        if model.dtype != wanted:  # a cast also rounds scales that the format has in float32
            model.to(wanted)
        model.save_pretrained(args.output, save_compressed=True)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)
