"""A conversation with a served model, answer by answer as it streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from lowbit.api.serve import plan, serving
from lowbit.core.errors import ServeError
from lowbit.runtimes.client import Client
from lowbit.runtimes.description import ServeOptions


@dataclass
class Conversation:
    """What was said so far, to one model. plain: the model has no chat template, so questions are texts to continue."""

    client: Client
    name: str
    plain: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str, *, max_tokens: int, temperature: float) -> Iterator[str]:
        """The answer, piece by piece; it becomes part of the conversation. Raises ServeError subclasses."""
        options = {"max_tokens": max_tokens, "temperature": temperature}
        if self.plain:
            for chunk in self.client.stream("/completions", {"prompt": question, **options}):
                yield from (str(choice.get("text") or "") for choice in chunk.get("choices") or [])
            return
        asked = [*self.messages, {"role": "user", "content": question}]
        said: list[str] = []
        for chunk in self.client.stream("/chat/completions", {"messages": asked, **options}):
            for choice in chunk.get("choices") or []:
                piece = str((choice.get("delta") or {}).get("content") or "")
                said.append(piece)
                yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]

    def forget(self) -> None:
        """Begin anew, with the system message if there is one."""
        self.messages = [message for message in self.messages if message["role"] == "system"]


@contextmanager
def conversations(
    targets: list[str],
    *,
    runtime: str | None = None,
    device: str = "auto",
    program: Path | None = None,
    key: str | None = None,
    model: str | None = None,
    system: str | None = None,
    patience: float = 600.0,
) -> Iterator[list[Conversation]]:
    """A conversation with each target: an http:// address of a server, or an artifact, which is served for as long.

    model: for an address that serves several. Raises LowbitError subclasses as `plan` and `serving` do.
    """
    start = [{"role": "system", "content": system}] if system else []
    with ExitStack() as stack:
        opened = []
        for target in targets:
            if target.startswith(("http://", "https://")):
                client = Client(_with_v1(target), model or "", key)
                client = client if client.model else replace(client, model=_first_model(client))
                opened.append(Conversation(client, target, messages=list(start)))
                continue
            options = ServeOptions(port=0, parallel=1, tensor_parallel=0)
            planned = plan(target, runtime=runtime, options=options, device=device, program=program)
            stack.enter_context(serving(planned, patience=patience))
            plain = not planned.artifact.chat_template
            opened.append(Conversation(planned.client, planned.model, plain, list(start)))
        yield opened


def _with_v1(url: str) -> str:
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def _first_model(client: Client) -> str:
    names = client.models()
    if not names:
        raise ServeError(f"{client.url} serves no model", hint="--model NAME")
    return names[0]
