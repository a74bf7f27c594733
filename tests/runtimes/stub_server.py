"""A server that answers as an OpenAI-compatible one does, with what a test wants; no model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = ["one", " two", " three", " four", " five"]


class Handler(BaseHTTPRequestHandler):
    """Completions say as many of WORDS as asked for; "refuse" in the prompt is an error, "break" breaks the stream off."""

    asked: list[dict[str, Any]]
    key: str

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "stub"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, "key": self.headers.get("Authorization", ""), **body})
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        if self.key and self.headers.get("Authorization") != f"Bearer {self.key}":
            self._send(401, {"error": {"message": "Invalid API Key"}})
        elif "refuse" in prompt:
            self._send(400, {"error": {"message": "the prompt is too long"}})
        elif body.get("stream"):
            self._stream(body, prompt)
        else:
            said = "".join(self._words(body))
            answer = {"text": said} if "prompt" in body else {"message": {"content": said}}
            self._send(200, {"choices": [answer], "usage": self._usage(body, prompt)})

    def _stream(self, body: dict[str, Any], prompt: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in self._words(body):
            piece = {"text": word} if "prompt" in body else {"delta": {"content": word}}
            self._event({"choices": [piece]})
            if "break" in prompt:
                self._event({"error": {"message": "the engine died"}})
                return
        self._event({"choices": [], "usage": self._usage(body, prompt)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b": a comment\n\ndata: " + json.dumps(chunk).encode() + b"\n\n")

    def _words(self, body: dict[str, Any]) -> list[str]:
        return (WORDS * body["max_tokens"])[: body["max_tokens"]]

    def _usage(self, body: dict[str, Any], prompt: str) -> dict[str, int]:
        # two tokens a word, so that counting words would be noticed
        return {"prompt_tokens": 2 * len(prompt.split()), "completion_tokens": body["max_tokens"]}

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def stub(key: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(url with /v1, all that was asked)."""
    asked: list[dict[str, Any]] = []
    handler = type("Stub", (Handler,), {"asked": asked, "key": key})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
