"""Tasks of lm-eval with their data pinned: a program for the environment that has lm-eval, without the rest of v4forge.

python derive.py spec.json: writes the derived tasks, and prints what it found as JSON. A derived task includes the
original and overrides where its data come from, so prompts and metrics stay lm-eval's. One whose answers are programs
is written out without the functions that would run them: importing those alone downloads and runs code.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any

import yaml

# Strings to stop at that vLLM takes in a request. A program is cut off at the others afterwards, which is the same for
# greedy answers.
MOST_STOPS = 4


class Loader(yaml.SafeLoader):
    """YAML with lm-eval's !function, which becomes its name."""


Loader.add_constructor("!function", lambda loader, node: f"!function {loader.construct_scalar(node)}")


def load(path: Path) -> dict[str, Any]:
    """A task with what it includes; functions are names."""
    found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    merged: dict[str, Any] = {}
    included = found.pop("include", [])
    for name in [included] if isinstance(included, str) else included:
        merged |= load(path.parent / name)
    return merged | found


def derived(path: Path, spec: dict[str, Any]) -> dict[str, Any] | None:
    """The task in `path` with the data that the spec names; None where the local data have nothing of it."""
    original = load(path)
    name = original["task"]
    task: dict[str, Any] = {"include": str(path), "task": name}
    if spec["code"]:
        task = {key: value for key, value in original.items() if "!function" not in json.dumps(value)}
        task |= {"unsafe_code": False, "metric_list": [{"metric": "bypass"}]}
    if spec["local"]:
        folder = Path(spec["local"])
        if spec["folders"]:
            folder /= str(original["dataset_name"])
        files = {split: folder / f"{split}.jsonl" for split in spec["splits"]}
        if not all(file.is_file() for file in files.values()) or not holds(files[spec["splits"][0]], name, spec):
            return None
        task |= {"dataset_path": "json", "dataset_name": None}
        task["dataset_kwargs"] = {"data_files": {split: str(file) for split, file in files.items()}}
    else:
        task["dataset_kwargs"] = {"revision": spec["revision"]}
    settings = original.get("generation_kwargs", {})
    if "max_gen_toks" in settings:
        task["generation_kwargs"] = settings | {"max_gen_toks": spec["max_tokens"], "until": stops(settings, spec)[0]}
    return task


def stops(settings: dict[str, Any], spec: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The strings that end an answer: those that the server is told, and those that are left to us."""
    until = settings["until"]
    most = MOST_STOPS if spec["code"] else len(until)
    return until[:most], until[most:]


def holds(file: Path, name: str, spec: dict[str, Any]) -> bool:
    """Whether a file that several parts share has questions of this one."""
    if not spec["group"] or spec["folders"]:
        return True
    prefix = f"{spec['lm_eval']}_"
    with open(file, encoding="utf-8") as lines:
        return any(prefix + json.loads(line)["category"].replace(" ", "_") == name for line in lines if line.strip())


def group(spec: dict[str, Any], tasks: list[str], root: Path) -> dict[str, Any]:
    """The group with these tasks: aggregated as lm-eval's own of the name, over all questions."""
    own = next(found for path in sorted(root.glob("_*.yaml")) if (found := load(path)).get("group") == spec["lm_eval"])
    return {**own, "task": tasks}


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    located = importlib.util.find_spec("lm_eval")
    if located is None or not located.submodule_search_locations:
        sys.exit("there is no lm_eval in this environment")
    root = Path(located.submodule_search_locations[0]) / "tasks"
    said: dict[str, Any] = {"lm_eval": importlib.metadata.version("lm_eval"), "python": platform.python_version()}
    said["tasks"] = {}
    for key, spec in request["tasks"].items():
        folder = Path(request["folder"]) / key
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.yaml"):
            old.unlink()
        names, missing, cut = [], [], []
        for path in sorted(root.glob(spec["source"])):
            task = derived(path, spec)
            if task is None:
                missing.append(path.stem)
                continue
            names.append(task["task"])
            cut = stops(load(path).get("generation_kwargs") or {"until": []}, spec)[1]
            write(folder / path.name, task)
        if spec["group"] and names:
            write(folder / "_group.yaml", group(spec, names, (root / spec["source"]).parent))
        said["tasks"][key] = {"names": names, "missing": missing, "cut": cut}
    print(json.dumps(said))


def write(path: Path, task: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(task, sort_keys=False, allow_unicode=True), encoding="utf-8")


if __name__ == "__main__":
    main()
