"""Model + hardware + wishes -> a ranked short list, with the commands that follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lowbit.api.memory import Model
from lowbit.core.errors import LowbitError
from lowbit.recommend import guide
from lowbit.recommend.candidates import Candidate, Facts, Option, Wishes
from lowbit.recommend.detect import detect
from lowbit.recommend.engine import Recommendation
from lowbit.recommend.engine import recommend as rank
from lowbit.recommend.hardware import Hardware, parse_hardware
from lowbit.recommend.memory import Load
from lowbit.recommend.records import BenchRecord, read_records
from lowbit.recommend.speed import Speed, Work, general_speed
from lowbit.recommend.words import text

_GROUPED = ("gptq", "awq")  # methods whose groups tensor parallelism must not cut


def recommend(
    model: str | Path,
    *,
    hardware: str | Hardware = "auto",
    scenario: str | None = None,
    wishes: Wishes | None = None,
    records: Path | None = None,
    revision: str | None = None,
) -> Recommendation:
    """Which method, for this model on this hardware, and why.

    model: checkpoint directory, artifact, .gguf file, config.json or hub id. hardware: see `parse_hardware`; "auto" is this
    machine. records: measurements to correct predictions with, by default those kept on this machine.
    Raises LowbitError subclasses.
    """
    place = hardware if isinstance(hardware, Hardware) else _hardware(hardware)
    opened = Model(model, revision=revision)
    facts = _facts(opened)
    options = _options(opened, facts) if not opened.quantized else [_as_it_is(opened)]
    earlier = [(record, _general(record, facts, place)) for record in read_records(records)]
    return rank(facts, options, place, wishes or Wishes(), scenario, earlier)


def next_commands(answer: Recommendation, candidate: Candidate) -> list[str]:
    """What to type to get and serve a candidate."""
    quantized = candidate.option.present
    method, load = candidate.option.method, answer.wishes.load
    name = Path(answer.model.name).name.removesuffix(".gguf").removesuffix(".json") or "model"
    gguf = candidate.runtime == "llama.cpp"
    output = f"{name}-{method}" + (".gguf" if gguf else "")
    source = Path(answer.model.name)
    given = str(source.parent) if source.name == "config.json" else answer.model.name
    parallel = f" --tensor-parallel {candidate.devices}" if candidate.devices > 1 and not gguf else ""
    asked = f" --runtime {candidate.runtime} --context {load.context} --parallel {load.concurrency}{parallel}"
    made = [] if quantized else [f"lowbit quantize {given} --method {method}{candidate.option.flags} -o {output}"]
    target = given if quantized else output
    return [*made, f"lowbit serve {target}{asked}", f"lowbit deploy serve {target} --runtime {candidate.runtime}"]


def _hardware(text: str) -> Hardware:
    return detect() if text == "auto" else parse_hardware(text)


def _facts(model: Model) -> Facts:
    """Parameters by role. Experts: of those that a token does not visit, nothing is read."""
    if model.gguf is not None:
        shapes = {name: tensor.shape for name, tensor in model.gguf.tensors.items()}
    else:
        shapes = model.streamed.parameter_shapes()
    counts = {name: _product(shape) for name, shape in shapes.items()}
    total = max(sum(counts.values()), 1)
    experts = sum(count for name, count in counts.items() if ".experts." in name or "_exps." in name)
    used = model.shape.experts_used / model.shape.experts if model.shape.experts else 1.0
    ends = sum(count for name, count in counts.items() if _is_end(name))
    return Facts(model.name, model.shape, total, int(total - experts * (1 - used)), ends / total)


def _is_end(name: str) -> bool:
    return any(
        part in name for part in ("embed_tokens", "word_embeddings", "lm_head", "wte", "token_embd", "output.weight")
    ) and ("attn" not in name)


def _options(model: Model, facts: Facts) -> list[Option]:
    options = []
    plain = facts.parameters * 2
    tied = not any("lm_head" in name or name == "output.weight" for name in _names(model))
    for method in guide.methods():
        try:
            size = model.size(method)
        except LowbitError as error:
            options.append(Option(method, problem=text("refused", why=error.message)))
            continue
        gguf = size.recipe.format == "gguf"
        rows = model.shape.vocabulary * model.shape.hidden
        bytes_each = size.weights / facts.parameters if gguf else 2
        problem = None
        if method not in ("bf16", "fp16") and size.weights > 0.9 * plain:
            share = size.weights / plain
            problem = text("experts" if model.shape.experts else "mostly", share=100 * share)
        group = size.recipe.group_size if isinstance(size.recipe.group_size, int) and method in _GROUPED else 0
        options.append(
            Option(method, size.file, size.weights, size.repacked, 0 if tied else int(rows * bytes_each), size.flags,
                   group, problem)
        )  # fmt: skip
    return options


def _as_it_is(model: Model) -> Option:
    """A model that is quantized already: what there is, under the guide's name for the nearest method."""
    kind = model.quantized
    known = guide.methods()
    if model.gguf is not None:
        bits = 8 * model.weights / max(sum(_product(t.shape) for t in model.gguf.tensors.values()), 1)
        types = [name for name, rule in known.items() if rule.runtimes == ("llama.cpp",)]
        method = min(types, key=lambda name: abs(known[name].bits - bits))
    else:
        method = kind if kind in known else {"fp8": "fp8", "bitsandbytes": "nf4"}.get(kind, _stored_method(model))
    return Option(method, model.weights, model.weights, model.repacked, present=True)


def _stored_method(model: Model) -> str:
    """compressed-tensors and modelopt say their numbers: 4 or 8 bits, integers or floats."""
    text = str(model.checkpoint.config.get("quantization_config"))
    if "nvfp4" in text.lower():
        return "nvfp4"
    if "'num_bits': 4" in text:
        return "gptq"
    activations = "'input_activations': {" in text
    return ("fp8" if "'float'" in text else "w8a8") if activations else "int8"


def _general(record: BenchRecord, facts: Facts, hardware: Hardware) -> Speed:
    """What the general rule says of a model that was measured: its file is read whole, two operations for each weight."""
    rule = guide.methods().get(record.scheme)
    bits = 16.0 if rule is None else rule.bits
    work = Work(record.artifact_bytes, 8 * record.artifact_bytes / bits, rule.speed if rule else 1.0)
    # of another model's cache nothing is known but that it is small beside its weights
    load = Load(max(record.context, 1), max(record.concurrency, 1))
    empty = replace(facts.shape, cache=())
    known = record.runtime if record.runtime in ("vllm", "llama.cpp", "transformers") else "vllm"
    return general_speed(work, facts.shape if record.model_id == facts.name else empty, load, known, hardware)


def _names(model: Model) -> list[str]:
    return list(model.gguf.tensors) if model.gguf is not None else list(model.streamed.parameter_shapes())


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
