"""What a served model streams in reply, for the tests of who reads it: as text, and as an answer of openai_stand_in."""

from __future__ import annotations

import json
from typing import Any

from openai_stand_in import Answer, Body, Handler

USAGE = {"prompt_tokens": 5, "completion_tokens": 30}
DRAFTS = {"num_accepted_draft_tokens": 7, "num_draft_tokens": 44}
DONE = "[DONE]"


def thinks(text: str, name: str = "reasoning") -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {name: text}}]}


def says(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def ends(finish: str = "stop", drafts: bool = True) -> list[dict[str, Any] | str]:
    """The last events: why it ended, the server's own count, and the mark of a whole answer."""
    counted = {"choices": [], "usage": USAGE} | ({"metrics": {"speculative_decoding": DRAFTS}} if drafts else {})
    return [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}, counted, DONE]


def stream(*events: dict[str, Any] | str) -> str:
    """Server-sent events, with a comment before, between and behind."""
    written = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return ": keep-alive\n\n" + ": keep-alive\n\n".join(f"data: {event}\n\n" for event in written)


def streaming(*events: dict[str, Any] | str) -> Answer:
    return lambda handler, _body: handler.say(200, stream(*events), "text/event-stream")


def going_on(text: str) -> Answer:
    """Says the text, and then nothing until its client leaves."""

    def answer(handler: Handler, _: Body) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(stream(says(text)).encode())
        handler.connection.recv(1)
        handler.close_connection = True

    return answer


def refusing(status: int, message: str, retry_s: int = 0) -> Answer:
    def answer(handler: Handler, _: Body) -> None:
        content = json.dumps({"error": {"message": message}}).encode()
        handler.send_response(status)
        if retry_s:
            handler.send_header("Retry-After", str(retry_s))
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer
