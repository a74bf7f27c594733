"""The real llama.cpp, embedded: xllamacpp's server in this process, on an address of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowbit.core.errors import VerificationError

# of the likeliest next tokens; what is beyond them weighs nothing
LISTED = 2000


@contextmanager
def embedded_server(file: Path, context: int, threads: int = 0) -> Iterator[str]:
    """The address of a server of a GGUF file, for prompts of up to `context` tokens; gone with the context.

    Raises VerificationError when xllamacpp is missing or cannot load the file.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise VerificationError(
            "the embedded llama.cpp is not installed, so the file was not run by it", hint="pip install 'lowbit[gguf]'"
        ) from error
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, 0
    if threads:
        params.cpuparams.n_threads = threads
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise VerificationError(f"llama.cpp could not load {file.name}: {error}") from error
    try:
        yield server.listening_address
    finally:
        del server  # ends its threads
