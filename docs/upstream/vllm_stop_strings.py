"""vLLM and lm-eval: five strings that end an answer, as lm-eval's humaneval asks for, are refused: vLLM takes four.

python vllm_stop_strings.py; needs vLLM and lm-eval, on a CPU, without a model. Exit code 0 when the request is refused,
1 when it is taken.
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.update(VLLM_PLUGINS="", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")

import lm_eval
import yaml
from pydantic import ValidationError
from vllm.entrypoints.openai.completion.protocol import CompletionRequest


class Loader(yaml.SafeLoader):
    """YAML with lm-eval's !function, whose name is enough here."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def main() -> int:
    print(f"vllm {version('vllm')}, lm-eval {version('lm-eval')}")
    task = Path(lm_eval.__file__).parent / "tasks" / "humaneval" / "humaneval.yaml"
    until = yaml.load(task.read_text(), Loader)["generation_kwargs"]["until"]
    print(f"humaneval ends an answer at {len(until)} strings")
    try:
        CompletionRequest(model="m", prompt="p", stop=until)
    except ValidationError as error:
        print(f"vLLM: {error.errors()[-1]['msg']}")
        return 0
    print("vLLM: takes them")
    return 1


if __name__ == "__main__":
    sys.exit(main())
