"""lowbit recommend."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.commands.parse import parse_bytes
from lowbit.core.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from lowbit.recommend.candidates import Candidate
    from lowbit.recommend.engine import Recommendation

NOT_GOOD_ENOUGH = 3


def recommend(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Checkpoint, artifact, .gguf file, config.json or hub id.")
    ],
    hardware: Annotated[
        str, typer.Option(help="rtx4090, h100x2, cpu:8c,32g, board:4g, gpu:24g,cc8.9 ... or auto: this machine.")
    ] = "auto",
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one request.", show_default="4096, or what the model has")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 1,
    scenario: Annotated[
        str | None,
        typer.Option(help="production-gpu, low-end-gpu, cpu, edge, high-accuracy; else from the hardware."),
    ] = None,
    max_memory: Annotated[str | None, typer.Option(help="What serving may take: 6GiB.")] = None,
    min_recovery: Annotated[float | None, typer.Option(help="Accuracy to keep, in percent: 99.")] = None,
    min_tokens_per_s: Annotated[
        float | None, typer.Option("--min-tokens-per-s", help="Tokens a second of one request.")
    ] = None,
    cache_dtype: Annotated[str, typer.Option(help="Of keys and values: fp16, fp8, q8_0 or q4_0.")] = "fp16",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    language: Annotated[str, typer.Option("--lang", help="en or zh.")] = "en",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which method for this model on this hardware, and why: what fits, how fast and how accurate it will be, what is ruled
    out, and the commands that follow. Exit code 3: nothing keeps all limits, the nearest are shown.

    Examples:

    lowbit recommend meta-llama/Llama-2-7b-hf --hardware t4

    lowbit recommend ./model --hardware h100x2 --concurrency 32 --min-recovery 99

    lowbit recommend ./model --hardware cpu:8c,16g --max-memory 6GiB --lang zh
    """
    from lowbit.api.recommend import recommend as ask
    from lowbit.recommend.candidates import Wishes
    from lowbit.recommend.memory import Load
    from lowbit.recommend.words import LANGUAGES

    if language not in LANGUAGES:
        raise RecipeError(
            f"language {language!r} is unknown{did_you_mean(language, LANGUAGES)}", hint="--lang en or zh"
        )
    wishes = Wishes(
        Load(context or 0, concurrency, cache_dtype), parse_bytes(max_memory), min_recovery, min_tokens_per_s
    )
    answer = ask(model, hardware=hardware, scenario=scenario, wishes=wishes, revision=revision)
    if as_json:
        print(json.dumps(_as_data(answer, language), indent=2, ensure_ascii=False))
    else:
        from lowbit.commands.recommend_print import show

        show(answer, language)
    if not answer.possible:
        raise typer.Exit(NOT_GOOD_ENOUGH)


def _as_data(answer: Recommendation, language: str) -> dict[str, Any]:
    hardware = answer.hardware
    return {
        "model": answer.model.name,
        "parameters": answer.model.parameters,
        "hardware": {**asdict(hardware), "features": list(hardware.features)},
        "scenario": answer.scenario,
        "asked": asdict(answer.wishes),
        "possible": answer.possible,
        "recommended": [_candidate(answer, candidate, language) for candidate in answer.ranked],
        "ruled_out": [
            {"method": ruled.method, "runtime": ruled.runtime, "reason": ruled.text.say(language),
             "source": ruled.text.source}
            for ruled in answer.ruled_out
        ],
        "advice": [text.say(language) for text in answer.advice],
    }  # fmt: skip


def _candidate(answer: Recommendation, candidate: Candidate, language: str) -> dict[str, Any]:
    from lowbit.api.recommend import next_commands

    return {
        "method": candidate.option.method,
        "runtime": candidate.runtime,
        "artifact_bytes": candidate.option.file,
        "memory": candidate.parts.to_dict(),
        "memory_budget": candidate.budget,
        "fits": candidate.fits,
        "decode_tokens_per_s": round(candidate.speed.decode, 2),
        "prefill_tokens_per_s": round(candidate.speed.prefill, 1),
        "speed_basis": candidate.speed.basis,
        "speed_error": candidate.speed.error,
        "recovery": round(candidate.recovery, 2),
        "largest_context": candidate.context,
        "largest_concurrency": candidate.concurrency,
        "reasons": [{"text": text.say(language), "source": text.source} for text in candidate.reasons],
        "notes": [{"text": text.say(language), "source": text.source} for text in candidate.notes],
        "missed": [text.say(language) for text in candidate.misses],
        "next": next_commands(answer, candidate),
    }
