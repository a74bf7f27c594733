"""The command line: one verb a file in lowbit.commands; this only collects them and turns errors into one line.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 it failed, 2 it was asked wrongly, 3 the result is
not good enough, 130 interrupted (run the same command again to continue).
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import typer

from lowbit.commands import deploy, env, recipe
from lowbit.commands.bench import bench
from lowbit.commands.chat import chat
from lowbit.commands.check import check
from lowbit.commands.compare import compare
from lowbit.commands.convert import convert
from lowbit.commands.demo import demo
from lowbit.commands.evaluate import evaluate
from lowbit.commands.fit import fit
from lowbit.commands.inspect import inspect
from lowbit.commands.methods import methods
from lowbit.commands.ps import logs, ps, stop
from lowbit.commands.push import push
from lowbit.commands.quantize import quantize
from lowbit.commands.recommend import recommend
from lowbit.commands.report import report
from lowbit.commands.serve import serve
from lowbit.commands.sweep import sweep
from lowbit.core.errors import LowbitError

# click's own class, which newer releases of typer carry themselves
_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")

app = typer.Typer(
    name="lowbit",
    help="Make a causal language model low-bit with every mainstream method, and prove what that cost.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    quantize,
    evaluate,
    compare,
    report,
    sweep,
    recommend,
    fit,
    inspect,
    convert,
    methods,
    demo,
    serve,
    check,
    chat,
    bench,
    push,
    ps,
    logs,
    stop,
):
    app.command()(verb)
app.add_typer(recipe.app, name="recipe")
app.add_typer(env.app, name="env")
app.add_typer(deploy.app, name="deploy")


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and exit.")
) -> None:
    if version:
        from lowbit import __version__

        print(f"lowbit {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Entry point of the `lowbit` script."""
    # the libraries below report their own progress and advice; ours is on stderr already
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(torch|transformers)")
    try:
        code = app(standalone_mode=False)
    except LowbitError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
    except _USAGE_ERROR as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted: run the same command again to continue where it stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
