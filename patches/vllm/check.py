"""Calls what the patches and the plugin change in vLLM, without a GPU: a line a check, exit code 1 if one fails.

    python check.py [NAME of a patch's check …]

Runs with the interpreter that vLLM is installed for. vLLM's own configuration, registry, model classes and loaders run,
on the CPU, over models/tiny, while its platform says that it is one H200. Where the compiled extensions do not load, as
without a driver or beside a CPU build of torch, empty modules stand in for them: no kernel runs here.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
EXTENSIONS = ("_C_stable_libtorch", "vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn._vllm_fa3_C")
# Ops of the extensions that vLLM asks or takes while it imports and builds; none is run, but for the questions.
QUESTIONS = ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8")
TAKEN = ("silu_and_mul_with_clamp",)
ROWS = (1, 2, 4)  # tokens a sequence that DeepGEMM's paged logits are written for on an H200
MTP_LAYER = "model.layers.4"
LATER = {"model.embed_tokens", f"{MTP_LAYER}.shared_head.head"}  # models/tiny has no aliases of head and embedding


def load_extensions() -> bool:
    """Imports the compiled extensions; False when they do not load here, and empty modules stand in for them."""
    try:
        importlib.import_module(f"vllm.{EXTENSIONS[0]}")
        return True
    except ImportError:
        sys.modules.update({f"vllm.{name}": ModuleType(f"vllm.{name}") for name in EXTENSIONS})
    for op in QUESTIONS:
        torch.library.define(f"_C::{op}", "(int capability) -> bool")
        torch.library.impl(f"_C::{op}", "CompositeExplicitAutograd", lambda capability: True)
    for op in TAKEN:
        torch.library.define(f"_C::{op}", "() -> ()")
    return False


def stand_in_for_a_gpu() -> None:
    """Makes vLLM plan and build for one H200, with every tensor on the CPU."""
    from vllm import platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class H200(NonNvmlCudaPlatform):
        device_type = "cpu"
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H200")
        get_device_total_memory = classmethod(lambda cls, device_id=0: 140 << 30)
        num_compute_units = classmethod(lambda cls, device_id=0: 132)
        import_kernels = classmethod(lambda cls: None)
        is_fully_connected = classmethod(lambda cls, device_ids: False)

    class Stream:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    platforms._current_platform = H200()
    properties = SimpleNamespace(
        multi_processor_count=132, total_memory=140 << 30, major=9, minor=0, name="NVIDIA H200"
    )
    properties.shared_memory_per_block_optin = 232448
    for name, value in {
        "is_available": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "Stream": Stream,
        "Event": Stream,
    }.items():
        setattr(torch.cuda, name, value)
    from vllm.model_executor.layers import sparse_attn_indexer
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()  # a child would not see this platform
    sparse_attn_indexer.has_deep_gemm = lambda: True


@lru_cache(maxsize=1)
def configuration() -> Any:
    """vLLM's configuration of models/tiny with one draft token, and the process groups that its layers ask for."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(TINY),
        skip_tokenizer_init=True,
        kv_cache_dtype="fp8",
        block_size=256,
        max_model_len=2048,
        enforce_eager=True,
        use_tqdm_on_load=False,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    ).create_engine_config()
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    return config


def build(draft: bool) -> tuple[torch.nn.Module, Any]:
    """The target or the draft model as vLLM builds it, and vLLM's model configuration for it."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = configuration()
    config.compilation_config.static_forward_context.clear()  # what an earlier model has entered
    model_config = config.speculative_config.draft_model_config if draft else config.model_config
    with set_current_vllm_config(config), set_default_torch_dtype(model_config.dtype), torch.device("cpu"):
        return initialize_model(vllm_config=config, model_config=model_config), model_config


def load(draft: bool, without: Collection[str] = ()) -> torch.nn.Module:
    """The target or the draft model with the tensors of models/tiny, less those named."""
    from vllm.model_executor.model_loader import get_model_loader

    model, model_config = build(draft)
    with configured():
        tensors = get_model_loader(configuration().load_config).get_all_weights(model_config, model)
        model.load_weights((name, tensor) for name, tensor in tensors if name not in without)
    return model


def configured() -> Any:
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(configuration())


def refused(action: Callable[[], Any], *names: str) -> None:
    """Asserts that `action` ends in the guard's error, and that it names these tensors or modules."""
    from v4forge_vllm.guard import UninitializedWeightsError

    try:
        action()
    except UninitializedWeightsError as error:
        unnamed = [name for name in names if name not in str(error)]
        assert not unnamed, f"{error} does not name {unnamed}"
    else:
        raise AssertionError(f"nothing was said without {', '.join(names)}")


def first_forward(model: torch.nn.Module) -> None:
    """What happens before the first forward pass of a model, without the pass."""
    for hook in list(model._forward_pre_hooks.values()):
        hook(model, ())


def static_input_scheme() -> None:
    """#43248: block FP8 weights whose input_activations are null get the scheme False, not None"""
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors

    weights = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    config = compressed_tensors.CompressedTensorsConfig({}, [], "float-quantized")
    with configured():
        scheme = config._get_scheme_from_parts(weights, None, format="float-quantized")
    assert scheme.is_static_input_scheme is False, scheme.is_static_input_scheme


def plugin() -> None:
    """the plugin is installed, and vLLM's registry gives its classes"""
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    found = [point.value for point in entry_points(group="vllm.general_plugins", name="v4forge")]
    assert found == ["v4forge_vllm:register"], found
    load_general_plugins()
    for architecture in ("DeepseekV4ForCausalLM", "DeepSeekV4MTPModel"):
        (cls, _) = ModelRegistry.resolve_model_cls([architecture], configuration().model_config)
        assert cls.__module__ == "v4forge_vllm.models", cls


def whole_checkpoint() -> None:
    """a whole checkpoint loads; head and embedding that vLLM gives the draft model from the target are accepted"""
    from vllm.v1.worker.gpu.spec_decode.eagle import utils

    # The compiler's passes name every op of the extensions; what the loading takes from them is a label for its cache.
    compiler = ModuleType("vllm.compilation.backends")
    compiler.__dict__["set_model_tag"] = lambda tag: nullcontext()
    sys.modules.setdefault(compiler.__name__, compiler)
    target, draft = load(draft=False), load(draft=True)
    utils.get_model = lambda **_: draft  # the loader around it asks for a GPU
    with configured():
        utils.load_eagle_model(target, configuration())
    first_forward(draft)


def draft_without_head() -> None:
    """C14: a head and an embedding that nothing gives the draft model stop vLLM in its first forward pass"""
    refused(lambda: first_forward(load(draft=True)), *LATER)


def torn_draft() -> None:
    """C14: a draft model that lacks a tensor stops vLLM, which by itself says nothing"""
    for tensor, named in {
        "mtp.0.enorm.weight": f"{MTP_LAYER}.enorm",
        "mtp.0.attn.wkv.weight": "mtp.0.attn.wkv.weight",
        "mtp.0.ffn.experts.3.w1.weight": "mtp.0.ffn.experts.3.w1.weight",
        "mtp.0.ffn.shared_experts.w3.scale": "mtp.0.ffn.shared_experts.w3.scale",
    }.items():
        refused(lambda tensor=tensor: load(draft=True, without=[tensor]), named)
        unguarded(draft=True, without=[tensor])


def torn_target() -> None:
    """a target model that lacks a tensor stops vLLM, which by itself says nothing"""
    for tensor, named in {
        "head.weight": "lm_head",
        "embed.weight": "model.embed_tokens",
        "layers.2.ffn.experts.7.w2.weight": "layers.2.ffn.experts.7.w2.weight",
        "layers.1.attn.compressor.wgate.weight": "layers.1.attn.compressor.wgate.weight",
    }.items():
        refused(lambda tensor=tensor: load(draft=False, without=[tensor]), named)
        unguarded(draft=False, without=[tensor])


def unguarded(draft: bool, without: Collection[str]) -> None:
    """Asserts that vLLM's own class still takes what the guard refuses; else the guard can go."""
    from v4forge_vllm import guard

    guarded = guard.Guard.load
    guard.Guard.load = lambda self, model, load, weights: load(weights)
    try:
        load(draft, without)
    except ValueError as error:
        raise AssertionError(f"vLLM itself refuses a model without {without}, the guard can go: {error}") from None
    finally:
        guard.Guard.load = guarded


def drafts() -> None:
    """C15: what DeepGEMM's logits do not take, vLLM gives them one token a row; any number of drafts needs no patch"""
    from vllm.v1.attention.backends.mla import indexer

    for k in range(1, 8):
        drafting = SimpleNamespace(num_speculative_tokens=k, speculative_config=None)
        assert k + 1 in ROWS or indexer._use_flattening(drafting), f"{k} drafts go to DeepGEMM as they are"


PATCHED = {check.__name__: check for check in (static_input_scheme,)}
ALWAYS = (plugin, whole_checkpoint, draft_without_head, torn_draft, torn_target, drafts)


def outcomes(names: Collection[str]) -> Iterator[bool]:
    for check in (*(PATCHED[name] for name in names), *ALWAYS):
        try:
            check()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            print(f"FAILED  {check.__doc__}", flush=True)
            yield False
        else:
            print(f"ok      {check.__doc__}", flush=True)
            yield True


def main(names: Collection[str]) -> int:
    where = "with its compiled extensions" if load_extensions() else "without its compiled extensions"
    stand_in_for_a_gpu()
    import vllm

    print(f"vLLM {vllm.__version__} {where}, torch {torch.__version__}", flush=True)
    return 0 if all(list(outcomes(names))) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
