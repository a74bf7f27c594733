"""What answers for an artifact while it is measured: the embedded llama.cpp, vLLM started for it, or a server that runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lowbit.api.serve import plan, serving
from lowbit.core.errors import RecipeError, did_you_mean
from lowbit.evals.llama_cpp import LISTED, embedded_server
from lowbit.evals.tasks.endpoint import Endpoint
from lowbit.runtimes.description import ServeOptions

IN_PROCESS = "transformers"
RUNTIMES = (IN_PROCESS, "llama.cpp", "vllm")
# of a server of OpenAI's interface that lowbit did not start: vLLM's default
_UNASKED = 20
_ASKED = 1000


@dataclass(frozen=True)
class Answering:
    """An endpoint, and how many likeliest tokens it tells of."""

    endpoint: Endpoint
    listed: int


def is_url(name: str) -> bool:
    """Whether a runtime or artifact is the address of a server."""
    return name.startswith(("http://", "https://"))


def check_runtime(runtime: str, artifact: str) -> None:
    """Raises RecipeError for a runtime that is unknown or cannot load the artifact."""
    if runtime == "llama.cpp" and not artifact.endswith(".gguf"):
        raise RecipeError("the embedded llama.cpp reads .gguf files", hint="--runtime transformers, or a .gguf file")
    if runtime not in RUNTIMES and not is_url(runtime):
        raise RecipeError(
            f"runtime {runtime!r} is unknown{did_you_mean(runtime, RUNTIMES)}",
            hint=f"{', '.join(RUNTIMES)}, or the URL of a server that runs already",
        )


@contextmanager
def answering(runtime: str, artifact: str, context: int, device: str) -> Iterator[Answering]:
    """Something that answers for `artifact` on prompts of up to `context` tokens; stopped in the end if started here.

    Raises EvaluationError for a server that does not answer, ServeError for one that does not start.
    """
    if is_url(runtime):
        yield _of(Endpoint(runtime), _UNASKED)
    elif runtime == "llama.cpp":
        with embedded_server(Path(artifact), context) as address:
            yield _of(Endpoint(address), LISTED)
    else:
        extra = ("--max-logprobs", str(_ASKED))
        options = ServeOptions(port=0, context=context, tensor_parallel=0, name="artifact", extra=extra)
        planned = plan(artifact, runtime=runtime, options=options, device=device)
        with serving(planned):
            yield _of(Endpoint(planned.url, model=planned.model), _ASKED)


def _of(endpoint: Endpoint, listed: int) -> Answering:
    return Answering(endpoint, LISTED if endpoint.is_llama_cpp else listed)
