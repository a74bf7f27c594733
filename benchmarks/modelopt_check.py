"""lowbit's `modelopt` artifacts beside those of ModelOpt's whole exporter, field by field, on the same small random model.

    python -m venv modelopt && modelopt/bin/pip install "nvidia-modelopt[hf]==0.47.0" torch
    .venv/bin/python benchmarks/modelopt_check.py --python modelopt/bin/python

For each algorithm: tensors that only one of the two has, tensors of another dtype or shape, entries of
hf_quant_config.json and of config.json's quantization_config that differ, and how far the dequantized weights of each
are from the original (methods differ, so these are near each other and not equal).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from _table import print_table
from safetensors import safe_open

import lowbit
from lowbit.api.run import Settings
from lowbit.core.checkpoint import open_checkpoint
from lowbit.formats.reader import open_artifact

PEER = Path(__file__).parent / "_peers" / "modelopt_export.py"
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "FP8": (["--config", "FP8_DEFAULT_CFG"], {"method": "fp8_static"}),
    "FP8 + FP8 KV cache": (
        ["--config", "FP8_DEFAULT_CFG", "--kv-cache"], {"method": "fp8_static", "kv_cache": "fp8"}
    ),
    "FP8_PER_CHANNEL_PER_TOKEN": (["--config", "FP8_PER_CHANNEL_PER_TOKEN_CFG"], {"method": "fp8"}),
    "W4A16_AWQ": (["--config", "INT4_AWQ_CFG"], {"method": "awq", "symmetric": True, "group_size": 128}),
    "NVFP4": (["--config", "NVFP4_DEFAULT_CFG"], {"method": "nvfp4_a4"}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of an environment with nvidia-modelopt")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = write_model(work / "model")
        for case in args.cases:
            theirs, ours = (work / f"{side} {case}".replace(" ", "-") for side in ("theirs", "ours"))
            argv, recipe = CASES[case]
            done = subprocess.run([args.python, PEER, model, theirs, *argv], capture_output=True, text=True)
            if done.returncode:
                rows.append(
                    {"algorithm": case, "differs": f"ModelOpt fails: {done.stderr.strip().splitlines()[-1][:150]}"}
                )
                continue
            text = {"dataset": str(model / "text.txt"), "num_samples": 8, "seq_len": 64}
            settings = Settings(verify=False, device="cpu")
            lowbit.quantize(
                model, output=ours, format="modelopt", dtype="bfloat16", settings=settings, **text, **recipe
            )
            rows.append({"algorithm": case, **compare(model, ours, theirs)})
    for row in rows:
        print(json.dumps(row))
    print_table([{key: value for key, value in row.items() if key != "differs"} for row in rows])


def compare(model: Path, ours: Path, theirs: Path) -> dict[str, Any]:
    """What differs between two artifacts of one model."""
    mine, other = header(ours), header(theirs)
    same = [name for name in mine.keys() & other.keys() if mine[name] == other[name]]
    differs = [f"only ours: {name}" for name in sorted(mine.keys() - other.keys())]
    differs += [f"only theirs: {name}" for name in sorted(other.keys() - mine.keys())]
    differs += [f"{n}: {mine[n]} / {other[n]}" for n in sorted(mine.keys() & other.keys()) if mine[n] != other[n]]
    for file, key in (("hf_quant_config.json", "quantization"), ("config.json", "quantization_config")):
        left, right = (flat(json.loads((side / file).read_text()).get(key, {})) for side in (ours, theirs))
        differs += [
            f"{file} {k}: {left.get(k)} / {right.get(k)}"
            for k in sorted(left.keys() | right.keys())
            if left.get(k) != right.get(k) and "producer" not in k
        ]
    return {
        "tensors": len(other), "alike": len(same), "error ours": error(model, ours), "error theirs": error(model, theirs),
        "differences": len(differs), "differs": differs,
    }  # fmt: skip


def header(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (dtype, shape)."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping
                part = stored.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def flat(value: Any, path: str = "") -> dict[str, str]:
    """Nested JSON as one level of text; lists without their order."""
    if isinstance(value, dict):
        return {
            k: v for name, inner in value.items() for k, v in flat(inner, f"{path}.{name}" if path else name).items()
        }
    return {path: json.dumps(sorted(value, key=str) if isinstance(value, list) else value)}


def error(model: Path, artifact: Path) -> float:
    """Squared error of all quantized weights over their squares, read back by lowbit."""
    base, back = open_checkpoint(model), open_artifact(open_checkpoint(artifact), torch.float32)
    lost = total = 0.0
    for name in base.tensors:
        if "_proj.weight" in name:
            weight = base.read(name).float()
            lost += float((back.read(name) - weight).square().sum())
            total += float(weight.square().sum())
    return round(lost / total, 6)


def write_model(folder: Path) -> Path:
    """A llama of two blocks, hidden 256, with a word tokenizer and some text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(512)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    ids = torch.randint(0, 512, (4000,), generator=torch.Generator().manual_seed(0))
    (folder / "text.txt").write_text(" ".join(f"w{n}" for n in ids.tolist()))
    return folder


if __name__ == "__main__":
    main()
