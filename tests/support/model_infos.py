"""vLLM's look at the classes that our plugin registers, in one process: `vllm serve` starts one for each of them, and
each imports vLLM. A program for the environment that serves; vLLM keeps in its cache what it finds.
"""

from __future__ import annotations

from typing import Any


def main() -> None:
    from v4forge_vllm import GUARDED
    from vllm.model_executor.models import registry
    from vllm.plugins import load_general_plugins

    registry._run_in_subprocess = lambda look: look()
    load_general_plugins()
    models: dict[str, Any] = registry.ModelRegistry.models
    for name in GUARDED:
        models[name].inspect_model_cls()


if __name__ == "__main__":
    main()
