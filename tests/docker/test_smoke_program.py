"""The Python function of the chat smoke, run in a container; and with it the whole bench of tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai_stand_in as stand_in
import pytest

from scripts import bench
from v4forge.bench import sandbox
from v4forge.bench.results import newest
from v4forge.bench.tools import play, smoke_prompts
from v4forge.bench.tools.chat_client import Reply
from v4forge.bench.tools.scenarios import CATEGORIES
from v4forge.images.containers import Engine

pytestmark = pytest.mark.images

(PROMPT,) = (prompt for prompt in smoke_prompts.load() if prompt.name == "calm-spells")

GOOD = """Here it is:

```python
def calm_spells(speeds, limit, least):
    found, start = [], None
    for place, speed in enumerate([*speeds, limit]):
        if speed < limit:
            start = place if start is None else start
        elif start is not None:
            if place - start >= least:
                found.append((start, place - start))
            start = None
    return found
```
"""

BAD = {
    "a last spell that is forgotten": GOOD.replace("[*speeds, limit]", "speeds"),
    "no function": "I would rather not.",
    "an early end": "```python\nimport sys\ndef calm_spells(*_):\n    sys.exit(0)\n```",
    "another file": "```python\ndef calm_spells(*_):\n    return open('/etc/shadow').read()\n```",
}


def part_of(engine: Engine, image: str, answer: str, limit_s: float = 8) -> dict[str, Any]:
    def run(programs: Sequence[str]) -> list[tuple[bool, str]]:
        return [(each.passed, each.detail) for each in sandbox.score(engine, image, programs, limit_s=limit_s)]

    return smoke_prompts.part(PROMPT, lambda _text: Reply(answer), run)


def test_a_function_that_is_right_passes_every_case(engine: Engine, image: str) -> None:
    part = part_of(engine, image, GOOD)
    assert part["ok"], part["checks"]
    assert len(part["checks"]) == 7


@pytest.mark.parametrize("answer", BAD.values(), ids=BAD)
def test_a_function_that_is_wrong_fails(engine: Engine, image: str, answer: str) -> None:
    part = part_of(engine, image, answer)
    assert not part["ok"] and part["checks"][0]["ok"]


def test_a_function_without_an_end_fails(engine: Engine, image: str) -> None:
    part = part_of(engine, image, "```python\ndef calm_spells(*_):\n    while True: pass\n```", limit_s=1)
    assert not any(check["ok"] for check in part["checks"][1:])


def test_the_perfect_player_wins_all_of_the_bench(image: str, tmp_path: Path) -> None:
    """Needs Chromium too."""
    with stand_in.serving(stand_in.perfect({"calm-spells": GOOD})) as server:
        places = ["--url", server.url, "--reports", str(tmp_path), "--folder", str(tmp_path / "none")]
        assert bench.main(["tools", *places, "--sandbox-image", image]) == 0
    content = newest(tmp_path, ["tools"])["tools"].content
    assert content["complete"] is True
    assert play.points(content["parts"]) == dict.fromkeys(CATEGORIES, (6, 6))
    assert smoke_prompts.counts(content["parts"]) == {"quick": (4, 4), "quality": (4, 4), "coding": (2, 2)}
    assert content["parts"]["smoke/coding/calm-spells"]["checked_with"]["docker"].startswith(image)


def test_without_the_image_the_part_is_not_measured_and_the_model_not_asked(tmp_path: Path, engine: Engine) -> None:
    with stand_in.serving(stand_in.perfect()) as server:
        places = ["--url", server.url, "--reports", str(tmp_path), "--folder", str(tmp_path / "none")]
        words = ["tools", *places, "--leave-out", *CATEGORIES, "smoke/quality", "smoke/coding/tide-table"]
        assert bench.main([*words, "--sandbox-image", "v4forge-not-there:0"]) == 1
    content = newest(tmp_path, ["tools"])["tools"].content
    assert content["complete"] is False and len(content["parts"]) == len(server.asked) == 4
    assert "--leave-out smoke/coding/calm-spells" in content["failures"]["smoke/coding/calm-spells"]["hint"]
