"""Result files as the benches write them, with made-up figures: of Flash on H200s, and trials of the tiny model."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from v4forge.intervals import share

FLASH_SIZE = {"num_hidden_layers": 43, "hidden_size": 4096, "n_routed_experts": 256}
TINY_SIZE = {"num_hidden_layers": 4, "hidden_size": 256, "n_routed_experts": 8}
SUMS = "5" * 64
STAMP = "20261126T010203Z"
TASKS = {
    "gsm8k": {"strict": (0.9310, 0.0070), "flexible": (0.9318, 0.0069)},
    "mmlu": {"accuracy": (0.8612, 0.0028)},
    "mmlu_pro": {"exact_match": (0.7143, 0.0040)},
    "humaneval_instruct": {"pass@1": (0.8659, 0.0267)},
    "aime24": {"exact_match": (0.3333, 0.0875)},
}
QUESTIONS = {"gsm8k": 1319, "mmlu": 14042, "mmlu_pro": 12032, "humaneval_instruct": 164, "aime24": 30}
CATEGORIES = ("selection", "precision", "chains", "restraint", "recovery")
WHY = "the server counts along its own answer; verify --deep judges every place of given text"


def facts(bench: str, tiny: bool, trial: int | None) -> dict[str, Any]:
    """Everything of a result file but its parts."""
    artifact = {
        "folder": "scratch/tiny/artifact" if tiny else "scratch/flash/artifact",
        "sums_sha256": SUMS,
        "config_sha256": "6" * 64,
        "certificate": "ok",
        **(TINY_SIZE if tiny else FLASH_SIZE),
    }
    return {
        "bench": bench,
        "form": 1,
        "complete": True,
        "trial": trial,
        "started": "2026-11-26T01:02:03+00:00",
        "ended": "2026-11-26T03:04:05+00:00",
        "commands": [f"python -m scripts.bench {bench} --artifact {artifact['folder']}"],
        "target": {
            "url": "http://127.0.0.1:8000",
            "model": "deepseek-v4-flash-w4a16",
            "max_model_len": 4096,
            "vllm": "0.x",
            "replicas": 1,
            "tensor_parallel": 1 if tiny else 2,
            "drafts": 3,
            "profile": "published",
            "backend": "cpu" if tiny else "cuda",
            "options": {},
            "artifact": artifact,
            "image": None if tiny else {"reference": "v4forge-serve", "id": "sha256:" + "7" * 64, "digests": []},
        },
        "machine": {
            "gpus": [] if tiny else ["NVIDIA H200"] * 8,
            "driver": None if tiny else "580",
            "cpu": "A CPU",
            "cpus": 2 if tiny else 192,
            "memory_gib": 23.4 if tiny else 2015.1,
        },
        "versions": {"v4forge": "a" * 40, "python": "3.12", "vllm": "0.x"},
        "settings": {"client": "vllm bench serve", "requests_per_concurrency": 8},
        "sampling": {"temperature": 0},
        "seed": 42,
        "hashes": {"prompts": "8" * 64},
        "parts": {},
        "failures": {},
    }


def distribution(values: np.ndarray) -> dict[str, Any]:
    return {
        "median": float(np.median(values)),
        "p99": float(np.percentile(values, 99)),
        "mean": float(values.mean()),
        "quartiles": [float(value) for value in np.percentile(values, [25, 75])],
    }


def speed_part(
    k: int, shape: tuple[int, int], concurrency: int, slower: float, seed: int, again: bool
) -> dict[str, Any]:
    """A point of a server that takes about 9 ms a token: drafts help at 1 and cost at 16."""
    random = np.random.default_rng([seed, k, *shape, concurrency, again])
    requests = 8 * concurrency
    gain = {1: 1 + 0.45 * k - 0.06 * k * k, 4: 1 + 0.12 * k - 0.05 * k * k, 16: 1 - 0.14 * k}.get(concurrency, 1.0)
    tpot = slower * 8.9 * (1 + 0.045 * (concurrency - 1)) / gain * random.normal(1, 0.03, requests)
    ttft = slower * (150 + 14 * concurrency) * random.gamma(9, 1 / 9, requests)
    whole = ttft + tpot * (shape[1] - 1)
    duration_s = float(whole.sum()) / concurrency / 1e3
    return {
        "drafts": k,
        "input_tokens": shape[0],
        "output_tokens": shape[1],
        "concurrency": concurrency,
        "again": again,
        "requests": requests,
        "completed": requests,
        "failed": 0,
        "duration_s": duration_s,
        "ttft_ms": distribution(ttft),
        "tpot_ms": distribution(tpot),
        "e2el_ms": distribution(whole),
        "output_tok_s": requests * shape[1] / duration_s,
        "request_s": requests / duration_s,
        "goodput_request_s": float((tpot < 12).sum()) / duration_s,
        "slo": {"ttft_ms": 1000.0, "tpot_ms": 25.0},
        "acceptance": None if k == 0 else 0.72 - 0.08 * k,
        "samples": {"ttft_ms": list(ttft), "tpot_ms": list(tpot), "e2el_ms": list(whole)},
    }


def speed(tiny: bool = False, trial: int | None = None, slower: float = 1.0, seed: int = 0) -> dict[str, Any]:
    parts = {}
    shapes = ((256, 256),) if tiny else ((256, 256), (1024, 1024))
    for k in (0, 1) if tiny else (0, 1, 2, 3):
        for shape in shapes:
            for concurrency in (1, 4) if tiny else (1, 4, 16):
                key = f"k{k}/{shape[0]}x{shape[1]}/c{concurrency}"
                parts[key] = speed_part(k, shape, concurrency, slower, seed, again=False)
        parts[f"k{k}/256x256/c1/again"] = speed_part(k, (256, 256), 1, slower, seed, again=True)
    return facts("speed", tiny, trial) | {"parts": parts}


def draft(tiny: bool = False, trial: int | None = None, seed: int = 0, worse: float = 0.0) -> dict[str, Any]:
    given: dict[str, Any] = {"acceptance": {"value": 0.70, "low": 0.68, "high": 0.72}}
    given["given_earlier"] = [{"value": v, "low": v - 0.02, "high": v + 0.02} for v in (0.80, 0.72, 0.66)]
    apart = {"acceptance": {"value": 0.01, "low": -0.02, "high": 0.04}, "given_earlier": given["given_earlier"]}
    offline = {"source": "certificate.json", "tokens": 8192, "sequences": 16, **given, "difference": apart, "why": WHY}
    parts = {}
    for number, (workload, rate) in enumerate({"random": 0.70, "code": 0.93, "chat": 0.82, "prose": 0.84}.items()):
        random = np.random.default_rng([seed, number])
        prompts = trial or (200 if workload == "random" else 50)
        drafts = random.integers(80, 140, prompts)
        accepted = [drafts]
        for k in range(3):
            accepted.append(random.binomial(accepted[-1], min(1.0, (rate - worse) * (1 - 0.05 * k))))
        at = np.array(accepted)
        parts[workload] = {
            "workload": workload,
            "prompts": prompts,
            "prompt_tokens": 256 * prompts,
            "tokens": 256 * prompts,
            "drafts": int(drafts.sum()),
            "draft_tokens": 3 * int(drafts.sum()),
            "accepted": int(at[1:].sum()),
            "accepted_at": [int(each.sum()) for each in at[1:]],
            "acceptance": share(at[1:].sum(0), 3 * at[0]).json(),
            "by_position": [share(each, at[0]).json() for each in at[1:]],
            "given_earlier": [share(each, before).json() for before, each in itertools.pairwise(at)],
            "counted": at.T.tolist(),
            "proposed": [3 * int(each) for each in drafts],
            "offline": offline,
        }
    return facts("draft", tiny, trial) | {"parts": parts}


def quality(tiny: bool = False, trial: int | None = None, better: float = 0.0) -> dict[str, Any]:
    parts = {}
    for task, metrics in TASKS.items():
        parts[task] = {
            "task": task,
            "fewshot": 5,
            "questions": trial or QUESTIONS[task],
            "metrics": {name: {"value": value + better, "se": se} for name, (value, se) in metrics.items()},
            "task_hash": "9" * 64,
            "as_published": task != "mmlu_pro",
            "differs": ["other prompts than published"] if task == "mmlu_pro" else [],
            "dataset": {"path": task, "revision": "b" * 40},
            "samples": f"quality-{task}.jsonl.gz",
            "elapsed_s": 100.0,
            "invalid": 3 if task == "aime24" else 0,
        }
    return facts("quality", tiny, trial) | {"parts": parts}


def tools(tiny: bool = False, trial: int | None = None, lost: int = 4) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for number, category in enumerate(CATEGORIES):
        for scenario in range(3):
            score = 1 if 3 * number + scenario < lost else 2
            parts[f"{category}/s{scenario}"] = {
                "category": category,
                "scenario": f"{category} {scenario}",
                "score": score,
                "most": 2,
                "why": [] if score == 2 else ["the second call has another city"],
                "turns": 2,
                "elapsed_s": 3.0,
                "trace": [],
            }
    for group, count in {"quick": 4, "quality": 4, "coding": 2}.items():
        for number in range(count):
            ok = not (group == "coding" and number == 1)
            parts[f"smoke/{group}/{number}"] = {
                "group": group,
                "ok": ok,
                "checks": [{"name": "has a button", "ok": ok, "detail": "button" if ok else "no <button> in the page"}],
                "prompt": "p",
                "answer": "a",
                "elapsed_s": 1.0,
            }
    return facts("tools", tiny, trial) | {"parts": parts}


BENCHES: dict[str, Callable[..., dict[str, Any]]] = {"speed": speed, "draft": draft, "quality": quality, "tools": tools}


def write(folder: Path, *results: dict[str, Any], stamp: str = STAMP) -> list[Path]:
    """Result files in a folder of reports."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{result['bench']}-{stamp}.json" for result in results]
    for path, result in zip(paths, results, strict=True):
        path.write_text(json.dumps(result))
    return paths


def full(tiny: bool = False, trial: int | None = None) -> list[dict[str, Any]]:
    """One of each bench."""
    return [copy.deepcopy(make(tiny, trial)) for make in BENCHES.values()]
