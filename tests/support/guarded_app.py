"""Stands in for `vllm serve` behind the middleware of access.py, with the real uvicorn of vLLM's environment.

    python guarded_app.py PORT SILENCE_S

A request is JSON: `events` of a stream, `first_s` and `event_s` until the first and between two; `torn` cuts each in
two, `event_s` apart; `more` bytes are sent with each. /version says how many streams run.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "patches" / "vllm" / "plugin"))

import uvicorn
from v4forge_vllm.access import Access

RUNNING: set[str] = set()
EVENT = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["method"] == "GET":
        await answer(send, json.dumps({"running": len(RUNNING)}).encode())
        return
    content = b""
    while (message := await receive()).get("more_body"):
        content += message["body"]
    asked = json.loads(content + message["body"] or b"{}")
    if "events" not in asked:
        await asyncio.sleep(asked.get("first_s", 0))
        await answer(send, b"{}")
        return
    RUNNING.add(name := str(id(scope)))
    work, left = asyncio.ensure_future(stream(send, asked)), asyncio.ensure_future(receive())
    await asyncio.wait([work, left], return_when=asyncio.FIRST_COMPLETED)
    for task in (work, left):
        task.cancel()
    RUNNING.discard(name)


async def stream(send: Any, asked: dict[str, Any]) -> None:
    head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
    await send(head)
    await asyncio.sleep(asked.get("first_s", 0))
    for number in range(asked["events"]):
        await asyncio.sleep(asked.get("event_s", 0) if number else 0)
        event = b":" * asked.get("more", 0) + b"\n" + EVENT if "more" in asked else EVENT
        for piece in (event[:9], event[9:]) if asked.get("torn") else (event,):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(asked["event_s"] if asked.get("torn") else 0)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def answer(send: Any, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    uvicorn.run(Access(app, silence_s=float(sys.argv[2])), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
