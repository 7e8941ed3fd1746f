"""Stands in for `vllm bench serve`, as a program: it really asks, and writes the result that a bench reads.
The real one imports for ten seconds of a core."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

START_S = 4.0  # as long as a test needs to end a server before it is asked


def option(name: str) -> str:
    return sys.argv[sys.argv.index(f"--{name}") + 1]


def ask(prompt: str) -> dict[str, Any]:
    """The figures of one answer, which streams; times in seconds."""
    asked = {"model": option("model"), "prompt": prompt, "max_tokens": int(option("custom-output-len"))}
    fixed = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    request = Request(option("base-url") + option("endpoint"), json.dumps(asked | fixed).encode(), headers)
    times, usage = [time.perf_counter()], {}
    with urlopen(request, timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                usage = event.get("usage") or usage
                times += [time.perf_counter()] if event["choices"] else []
    return {
        "ttfts": times[1] - times[0],
        "itls": [after - before for before, after in pairwise(times[1:])],
        "latencies": times[-1] - times[0],
        "input_lens": usage["prompt_tokens"],
        "output_lens": usage["completion_tokens"],
        "errors": "",
    }


def main() -> None:
    time.sleep(START_S)
    prompts = [json.loads(line)["prompt"] for line in Path(option("dataset-path")).read_text().splitlines()]
    started = time.perf_counter()
    with ThreadPoolExecutor(int(option("max-concurrency"))) as pool:
        answers = list(pool.map(ask, prompts))
    result = {"duration": time.perf_counter() - started, "completed": len(answers), "failed": 0}
    columns = {name: [answer[name] for answer in answers] for name in answers[0]}
    Path(option("result-dir"), option("result-filename")).write_text(json.dumps(result | columns))


if __name__ == "__main__":
    main()
