"""`transformers serve` with what it cannot express: settings of bitsandbytes, an API key, a name for the model.

    LOAD_IN_4BIT=true BNB_4BIT_QUANT_TYPE=fp4 python -m lowbit.runtimes.transformers_server --model DIR --port 8000

The variables are those of bnb_variables.py; the key comes from LOWBIT_API_KEY. Handlers, generation and endpoints are the
library's (transformers 5.23, cli/serving); of those, only the ones that ask the served model are offered: `/load_model`
would let any client load any model. SIGTERM finishes what is being answered.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from lowbit.core.errors import LowbitError
from lowbit.runtimes.bnb_variables import from_variables
from lowbit.runtimes.description import BitsAndBytes

OFFERED = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models")
_Asgi = Callable[[Any, Any, Any], Awaitable[None]]


def main() -> None:
    """Entry point; exits with 2 for variables that contradict each other."""
    arguments = _parser().parse_args()
    try:
        wanted = from_variables(os.environ)
    except LowbitError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
    import torch
    import uvicorn

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    app = Gate(_app(arguments, wanted), os.environ.get("LOWBIT_API_KEY", ""))
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="info", timeout_graceful_shutdown=30)


class Gate:
    """ASGI middleware: offers OFFERED and /health, and asks for the key everywhere but at /health."""

    def __init__(self, app: _Asgi, key: str) -> None:
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hand on what is allowed; answer 401 or 404 to the rest, in OpenAI's form."""
        if scope["type"] != "http" or scope["path"] == "/health":
            await self.app(scope, receive, send)
        elif scope["path"] not in OFFERED:
            await _answer(send, 404, f"there is no {scope['path']} here", "not_found_error")
        elif self.key and not hmac.compare_digest(_bearer(scope), self.key):
            await _answer(send, 401, "the API key is missing or wrong", "authentication_error")
        else:
            await self.app(scope, receive, send)


def quantization_config(wanted: BitsAndBytes | None) -> Any:
    """transformers' BitsAndBytesConfig; None for no quantization."""
    if wanted is None:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    if wanted.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=wanted.quant_type,
        bnb_4bit_compute_dtype=getattr(torch, wanted.compute_dtype),
        bnb_4bit_use_double_quant=wanted.double_quant,
    )


def _app(arguments: argparse.Namespace, wanted: BitsAndBytes | None) -> Any:
    from fastapi import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState

    class OneModel(ModelManager):  # type: ignore[misc]  # transformers has no types
        """The library's manager of one model, under a name of ours, with any settings of bitsandbytes."""

        def get_quantization_config(self) -> Any:
            return quantization_config(wanted)

        def _load_model(self, model_id_and_revision: str, *rest: Any, **named: Any) -> Any:
            return super()._load_model(f"{arguments.model}@main", *rest, **named)

        def _load_processor(self, model_id_and_revision: str, *rest: Any, **named: Any) -> Any:
            return super()._load_processor(f"{arguments.model}@main", *rest, **named)

        def get_gen_models(self) -> list[dict[str, Any]]:
            return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "lowbit"}]

    name = arguments.name or os.path.basename(os.path.normpath(arguments.model))
    manager = OneModel(device=arguments.device, dtype=arguments.dtype, force_model=name)
    state = GenerationState()
    parts = {"model_manager": manager, "generation_state": state}
    app = build_server(
        manager,
        ChatCompletionHandler(**parts, chat_template_kwargs={}),
        completion_handler=CompletionHandler(**parts),
        response_handler=ResponseHandler(**parts, chat_template_kwargs={}),
        transcription_handler=None,  # not offered, see OFFERED
        systemone_handler=None,
        generation_state=state,
    )
    app.add_exception_handler(HTTPException, _in_openais_form)
    return app


async def _in_openais_form(request: Any, error: Any) -> Any:
    """The library answers {"detail": ...}, in which OpenAI's clients find no message."""
    from fastapi.responses import JSONResponse

    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    content = {"error": {"message": str(error.detail), "type": kind, "code": error.status_code}}
    return JSONResponse(content, error.status_code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--name", default="", help="what clients call it; by default the directory's name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of unquantized tensors")
    parser.add_argument("--threads", type=int, default=0, help="of torch on a CPU")
    return parser


def _bearer(scope: Any) -> bytes:
    header: bytes = dict(scope["headers"]).get(b"authorization", b"")
    return header.removeprefix(b"Bearer ")


async def _answer(send: Any, status: int, message: str, kind: str) -> None:
    body = json.dumps({"error": {"message": message, "type": kind, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    main()
