"""lowbit quantize."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.commands.parse import parse_alpha, parse_bytes, parse_group_size, parse_options
from lowbit.core.errors import LowbitError, RecipeError

if TYPE_CHECKING:
    from lowbit.recipe import Recipe


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, .gguf file or hub id.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where the artifact goes.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Preset or method: gptq, awq, int8_sq, fp8 ... (lowbit methods).")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Of the weights: int, float (FP8), mxfp4 or nvfp4; then in groups of their own size."),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a weight.")] = None,
    group_size: Annotated[
        str | None, typer.Option(help="Columns that share a scale; 0 one scale a row; auto picks one that fits.")
    ] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--zero-point", help="Symmetric, or with zero points.")] = None,
    act_order: Annotated[str | None, typer.Option(help="gptq: static (loads everywhere), desc or none.")] = None,
    desc_act: Annotated[
        bool, typer.Option("--desc-act", help="gptq: the old reordered groups; vLLM refuses them.")
    ] = False,
    dataset: Annotated[
        str | None,
        typer.Option(help="c4, wikitext, pileval, ultrachat, pydoc, self, a file, or ORG/NAME:split:column."),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", "--calib-size", help="Calibration windows.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of windows.")] = None,
    transform: Annotated[
        list[str] | None, typer.Option(help="Done to the weights before the method; repeatable.")
    ] = None,
    alpha: Annotated[
        str | None, typer.Option(help="smoothquant: share of the inputs' range moved into weights; auto searches it.")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="none, int8, int8_static, fp8, fp8_static, fp8_group, mxfp4 or nvfp4.")
    ] = None,
    kv_cache: Annotated[str | None, typer.Option(help="fp8 stores scales for an 8-bit cache; none.")] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="compressed-tensors, gptq, gptq_v2 ... (see lowbit recipe show).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of unquantized tensors: auto, float16, bfloat16.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layers left in 16 bits: glob or re:...; repeatable.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="A method's option.")
    ] = None,
    effort: Annotated[
        str, typer.Option(help="fast, balanced, or best: trained rounding and a last pass over all scales.")
    ] = "balanced",
    tune: Annotated[
        int | None, typer.Option(metavar="STEPS", help="Steps of the last pass over scales and norms; 0 for none.")
    ] = None,
    tune_codes: Annotated[
        bool | None,
        typer.Option(
            help="Train codes in the last pass too: a GPU, minutes, 16 bytes a weight; best does for k-quants."
        ),
    ] = None,
    refine: Annotated[
        str | None, typer.Option(help="GGUF: hessian (default with a --dataset), imatrix or none.")
    ] = None,
    imatrix: Annotated[Path | None, typer.Option(help="GGUF: an importance matrix made before.")] = None,
    pure: Annotated[bool, typer.Option("--pure", help="GGUF: one type for all, no mixture.")] = False,
    leave_output_tensor: Annotated[
        bool, typer.Option("--leave-output-tensor", help="GGUF: output.weight as it is.")
    ] = False,
    output_tensor_type: Annotated[str | None, typer.Option(help="GGUF: type of output.weight.")] = None,
    token_embedding_type: Annotated[str | None, typer.Option(help="GGUF: type of token_embd.weight.")] = None,
    tensor_type: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN=TYPE", help="GGUF: type of tensors that match; repeatable.")
    ] = None,
    fit_types: Annotated[
        bool | None,
        typer.Option(help="GGUF: types that cost least in a file no larger, as lowbit fit; best does for k-quants."),
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="GGUF: take a file that is quantized already.")
    ] = False,
    max_shard_size: Annotated[str | None, typer.Option(help="GGUF: split into files of at most this: 4GB.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe in YAML; flags above override it.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
    gpus: Annotated[
        int | None, typer.Option(metavar="N", help="Share the work among N GPUs (or torchrun -m lowbit quantize).")
    ] = None,
    max_memory: Annotated[str | None, typer.Option(help="For calibration states before they go to disk: 2GiB.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read back and measure the result.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Then serve it and check what the runtime answers (lowbit check).")
    ] = False,
    max_kl: Annotated[float | None, typer.Option(help="Fail when the KL divergence is above this (nats).")] = None,
    min_recovery: Annotated[
        float | None,
        typer.Option(help="Fail when less than this percentage of the base's quality (perplexity) is left."),
    ] = None,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="Where it fails so, try the next better scheme.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop an unfinished run instead of continuing it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done, with sizes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Quantize a model, read the result back and measure it. Run it again to continue after a crash.

    Examples:

    lowbit quantize meta-llama/Llama-3.2-1B --method gptq --bits 4 --group-size 128 --dataset c4 -o llama-w4

    lowbit quantize ./model --method gptq --group-size auto --dataset pydoc --format gptq -o model-gptq

    lowbit quantize ./model --method gptq --kind nvfp4 --dataset wikitext -o model-nvfp4

    lowbit quantize model.gguf --recipe recipe.yaml -o out --dry-run

    lowbit quantize ./llama-70b --gpus 4 -o llama-70b-w4
    """
    from lowbit.api.effort import resolved
    from lowbit.api.fallback import quantize_with_fallback
    from lowbit.api.launch import check_gpus, check_shared, launch, report_failure
    from lowbit.api.quantize import plan
    from lowbit.api.quantize import quantize as run
    from lowbit.api.run import Settings
    from lowbit.commands.progress import listener
    from lowbit.core.distributed import leads, started_by_torchrun

    options = parse_options(option or [])
    if act_order or desc_act:
        options["act_order"] = "desc" if desc_act else act_order
    options |= _gguf_options(
        refine=refine,
        imatrix=None if imatrix is None else str(imatrix),
        pure=pure or None,
        leave_output_tensor=leave_output_tensor or None,
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        tensor_type=tensor_type or None,
        fit_types=fit_types,
        allow_requantize=allow_requantize or None,
        max_shard_size=parse_bytes(max_shard_size),
    )
    chosen = _recipe(recipe, method, output).updated(
        kind=kind,
        bits=bits,
        group_size=parse_group_size(group_size),
        symmetric=sym,
        dataset=dataset,
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        transforms=tuple(transform) if transform else None,
        activations=activations,
        kv_cache=kv_cache,
        format=format,
        dtype=dtype,
        ignore=tuple(ignore) if ignore else None,
        options=options or None,
    )
    chosen = resolved(chosen, effort, model, device, revision, tune_steps=tune, tune_codes=tune_codes)
    if alpha is not None:
        chosen = chosen.updated(transform_options={"alpha": parse_alpha(alpha)})
    settings = Settings(device, parse_bytes(max_memory), revision, not no_verify, max_kl, restart, min_recovery)
    if no_verify and (fallback or max_kl is not None or min_recovery is not None):
        raise RecipeError("--max-kl, --min-recovery and --fallback need verification", hint="leave --no-verify out")
    if dry_run and chosen.format == "gguf":
        from lowbit.commands.gguf_plan import print_gguf_plan

        print_gguf_plan(model, chosen, settings, as_json=as_json)
        return
    if dry_run:
        _print_plan(*plan(model, recipe=chosen, settings=settings), chosen, as_json)
        return
    if output is None:
        raise RecipeError("no output was named", hint="-o DIR, or --dry-run to see what would be done")
    if desc_act:
        typer.echo(
            "warning: vLLM refuses desc_act checkpoints since 0.32; --act-order static loads everywhere", err=True
        )
    if fallback and ((gpus or 1) > 1 or started_by_torchrun()):
        raise RecipeError("--fallback works with one process", hint="leave --gpus or --fallback out")
    if gpus is not None and not started_by_torchrun():
        check_gpus(gpus, device)
        if gpus > 1:
            check_shared(chosen, gpus)
            launch(gpus, sys.argv[1:])
            return
    with listener(quiet=quiet or as_json or not leads()) as progress:
        quantized = quantize_with_fallback if fallback else run
        try:
            result = quantized(model, output=output, recipe=chosen, settings=settings, progress=progress)
        except LowbitError as error:
            if gpus is None or not started_by_torchrun():
                raise
            report_failure(error)
            raise typer.Exit(error.exit_code) from error
    if not leads():
        return
    if as_json:
        print(json.dumps({"path": str(result.path), **result.record, "run": result.run}, indent=2))
    else:
        _print_result(result)
    if check:
        from lowbit.commands.check import run_check

        run_check(str(result.path), quiet=quiet or as_json)


def _gguf_options(**given: Any) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _recipe(file: Path | None, method: str | None, output: Path | None) -> Recipe:
    from lowbit.api.quantize import recipe_for
    from lowbit.recipe import Recipe

    if file is None and method is not None and output is not None and output.suffix == ".gguf":
        from lowbit.api.gguf_options import gguf_recipe

        return gguf_recipe(method)
    if file is None:
        return recipe_for(method or "gptq")
    recipe = Recipe.load(file)
    return recipe if method is None else recipe.updated(method=method)


def _print_plan(plan: Any, expected: Any, recipe: Recipe, as_json: bool) -> None:
    weights, bits = plan.quantized_bits()
    if as_json:
        layers = {
            path: {"shape": layer.shape, "scheme": layer.scheme.name, "method": layer.method.name}
            for path, layer in plan.layers.items()
        }
        print(json.dumps({"bytes": plan.nbytes, "bits_per_weight": bits / max(weights, 1), "layers": layers,
                          "predicted_memory": expected.memory, "predicted_seconds": round(expected.seconds, 1),
                          "skipped": plan.skipped, "recipe": recipe.model_dump(mode="json")}, indent=2))  # fmt: skip
        return
    from rich.console import Console
    from rich.table import Table

    from lowbit.commands.gguf_plan import print_expected

    table = Table("layer", "out x in", "method", "numbers", "MiB", header_style="bold")
    for path, layer in plan.layers.items():
        stored = sum(spec.nbytes for name, spec in plan.layout.items() if name.rpartition(".")[0] == path)
        numbers = f"{layer.scheme.name} " + (
            f"g{layer.scheme.weights.group_size}" if layer.scheme.weights.group_size else "channel"
        )
        table.add_row(path, f"{layer.shape[0]} x {layer.shape[1]}", layer.method.name, numbers, f"{stored / 2**20:.2f}")
    console = Console()
    console.print(table)
    console.print(f"left in 16 bits: {', '.join(plan.skipped) or 'no linear layer'}")
    if weights:
        console.print(f"{len(plan.layers)} layers, {bits / weights:.3f} bits per quantized weight with all metadata")
    console.print(f"the artifact will take exactly {plan.nbytes / 2**20:.1f} MiB")
    print_expected(console, expected)


def _print_result(result: Any) -> None:
    from lowbit.report.tables import print_table, row

    name = str(result.path)
    print_table([row(name, result.record, result.run, result.measurement)], title=name)
    if result.run["resumed_blocks"]:
        print(f"continued an earlier run: {result.run['resumed_blocks']} blocks were done before")
    print(f"next: lowbit inspect {name}; lowbit evaluate {name} --base {result.record['base']['name']}")
