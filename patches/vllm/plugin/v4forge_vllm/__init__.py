"""The vLLM plugin of v4forge: DeepSeek-V4's classes with a guard over what their weights are loaded from."""

GUARDED = {
    "DeepseekV4ForCausalLM": "v4forge_vllm.models:DeepseekV4ForCausalLM",
    "DeepSeekV4MTPModel": "v4forge_vllm.models:DeepSeekV4MTP",
}


def register() -> None:
    """The entry point of vllm.general_plugins, called in each process of vLLM. Raises where it knows no such models."""
    from vllm import ModelRegistry

    unknown = [name for name in GUARDED if name not in ModelRegistry.models]
    if unknown:
        raise RuntimeError(f"this vLLM knows no {unknown[0]}, which the plugin v4forge guards")
    for name, path in GUARDED.items():
        ModelRegistry.register_model(name, path)
