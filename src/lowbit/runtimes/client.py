"""A small client of OpenAI-compatible servers, on the standard library alone: answers, and streams as they come."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.core.errors import ServeError


class RefusedError(ServeError):
    """The server answered, but with an error; `status` is HTTP's."""

    def __init__(self, status: int, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class UnreachableError(ServeError):
    """Nobody answers there, or the connection broke off."""


@dataclass(frozen=True)
class Client:
    """url: with /v1, "http://127.0.0.1:8000/v1". timeout: seconds without a byte."""

    url: str
    model: str = ""
    key: str | None = None
    timeout: float = 600.0

    def models(self) -> list[str]:
        """Names that the server answers to. Raises RefusedError and UnreachableError, as all methods do."""
        return [str(entry["id"]) for entry in self._json("GET", "/models", None)["data"]]

    def complete(self, prompt: str, **options: Any) -> dict[str, Any]:
        """POST /completions."""
        return self._json("POST", "/completions", {"model": self.model, "prompt": prompt, **options})

    def chat(self, messages: list[dict[str, str]], **options: Any) -> dict[str, Any]:
        """POST /chat/completions."""
        return self._json("POST", "/chat/completions", {"model": self.model, "messages": messages, **options})

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """POST with stream=true; every chunk as soon as it is here. Closing the iterator closes the connection."""
        connection = self._connection()
        try:
            response = self._send(connection, "POST", path, {"model": self.model, **body, "stream": True})
            while line := _read_line(response, self.url):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk and not chunk.get("choices"):
                    raise RefusedError(500, f"the server broke off its answer: {_message(chunk)}")
                yield chunk
        finally:
            connection.close()

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        connection = self._connection()
        try:
            answer: dict[str, Any] = json.loads(self._send(connection, method, path, body).read())
            return answer
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UnreachableError(f"the connection to {self.url} broke off: {_words(error)}") from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        parts = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "", parts.port, timeout=self.timeout)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Mapping[str, Any] | None
    ) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            target = urllib.parse.urlsplit(self.url).path.rstrip("/") + path
            connection.request(method, target, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(
                f"nobody answers at {self.url}: {_words(error)}", hint="lowbit ps shows the servers that run"
            ) from error
        if response.status == 200:
            return response
        text = response.read().decode(errors="replace")
        if response.status == 401:
            raise RefusedError(401, f"{self.url} refused the API key", hint="--api-key KEY, or LOWBIT_API_KEY")
        raise RefusedError(response.status, f"{self.url} answered {response.status}: {_said(text)}")


def _read_line(response: http.client.HTTPResponse, url: str) -> bytes:
    try:
        return response.readline()
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(f"the connection to {url} broke off: {_words(error)}") from error


def _said(text: str) -> str:
    try:
        return _message(json.loads(text))[:500]
    except ValueError:
        return text.strip()[:500]


def _message(answer: Any) -> str:
    if not isinstance(answer, dict):
        return str(answer)
    error = answer.get("error", answer.get("detail", answer))
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
