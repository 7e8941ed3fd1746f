"""The vLLM plugin of BACKEND=cpu: lets vLLM's CPU build serve a DeepSeek-V4 artifact, with its MTP block. For tests."""

MOE_METHODS = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"


def register() -> None:
    """The entry point of vllm.general_plugins, called in each process of vLLM. Does nothing but on a CPU.

    vLLM may be half imported at that moment: what it imports later is changed when it has been.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from v4forge_vllm_cpu import changes

    changes.after_import("vllm.models.deepseek_v4", changes.models)
    changes.after_import(f"{MOE_METHODS}.compressed_tensors_moe_w4a4_mxfp4", changes.mxfp4)
    changes.after_import("vllm.distributed.device_communicators.shm_broadcast", changes.waiting)
    changes.after_import("vllm.v1.engine.core", changes.poison)
    changes.platform(type(current_platform))
