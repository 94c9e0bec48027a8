"""An HTTP server on this machine that speaks OpenAI's streamed chat completions, as told.

A test gives it a script for each request: what to send, when to wait, where to break off.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

__all__ = ["DROP", "ChatServer", "chat_server", "say", "tool_call"]

DROP = "drop"  # the connection breaks here
# A status to refuse with, or what is sent: chunks, seconds to wait, DROP.
Script: TypeAlias = int | Sequence[dict[str, Any] | float | str]


class ChatServer:
    """What it answers, and what it was asked."""

    def __init__(self, scripts: list[Script]) -> None:
        self.scripts = scripts
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.n_broken = 0  # answers that the client did not stay to hear
        self.url = ""


def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "m",
        "choices": [choice],
    }


def say(*words: str, finish: str | None = "stop") -> list[dict[str, Any]]:
    """An answer, word by word; without `finish`, it has no end."""
    said = [chunk({"role": "assistant", "content": word}) for word in words]
    return [*said, chunk({}, finish)] if finish else said


def tool_call(*calls: tuple[str, str]) -> list[dict[str, Any]]:
    """Calls of tools (name, JSON of arguments), their arguments in two pieces."""
    chunks = []
    for i, (name, arguments) in enumerate(calls):
        half = len(arguments) // 2
        first = {"name": name, "arguments": arguments[:half]}
        call = {"index": i, "id": f"call_{i}", "type": "function", "function": first}
        chunks.append(chunk({"tool_calls": [call]}))
        rest = {"index": i, "function": {"arguments": arguments[half:]}}
        chunks.append(chunk({"tool_calls": [rest]}))
    return [*chunks, chunk({}, "tool_calls")]


@contextmanager
def chat_server(*scripts: Script) -> Iterator[ChatServer]:
    """Runs one; its `url` is what a worker takes as `base_url`."""
    told = ChatServer(list(scripts))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            told.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            told.headers.append({key.lower(): value for key, value in self.headers.items()})
            script = told.scripts.pop(0)
            if isinstance(script, int):
                self._refuse(script)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                self._stream(script)
            except OSError:
                told.n_broken += 1

        def _refuse(self, status: int) -> None:
            body = json.dumps({"error": {"message": f"refused with {status}"}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _stream(self, script: Sequence[Any]) -> None:
            for item in script:
                if item == DROP:
                    self.close_connection = True
                    return
                if isinstance(item, float):
                    time.sleep(item)
                else:
                    self._send(f"data: {json.dumps(item)}\n\n")
            self._send("data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")

        def _send(self, text: str) -> None:
            data = text.encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()  # waits for the handlers
        thread.join()
