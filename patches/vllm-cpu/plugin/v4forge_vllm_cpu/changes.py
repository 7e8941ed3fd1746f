"""What is changed in vLLM while it runs, and when. Imports nothing of vLLM before vLLM does."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

POISON = "V4FORGE_CPU_POISON"


class AfterImport(MetaPathFinder, Loader):
    """Finds the module `name` as others do, and calls `change` with it once it has been imported."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change
        self.real: Loader | None = None

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            self.real, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec) if self.real else None

    def exec_module(self, module: ModuleType) -> None:
        if self.real:
            module.__loader__ = module.__spec__.loader = self.real  # type: ignore[union-attr]
            self.real.exec_module(module)
        self.change(module)


def after_import(name: str, change: Callable[[ModuleType], None]) -> None:
    """Calls `change` with the module `name` now if it is there, else when it is first imported; once in a process."""
    if any(isinstance(finder, AfterImport) and finder.name == name for finder in sys.meta_path):
        return
    module = sys.modules.get(name)
    if module is None:
        sys.meta_path.insert(0, AfterImport(name, change))
    else:
        change(module)


def models(deepseek_v4: ModuleType) -> None:
    """Puts our classes where vLLM, and a plugin that derives from its classes, looks for DeepSeek-V4's."""
    from v4forge_vllm_cpu import experts, fp8, model, routing

    fp8.allow_without_amx()
    experts.replace()
    routing.replace()
    deepseek_v4.DeepseekV4ForCausalLM = model.DeepseekV4ForCausalLM  # type: ignore[attr-defined]
    deepseek_v4.DeepSeekV4MTP = model.DeepSeekV4MTP  # type: ignore[attr-defined]


def mxfp4(method: ModuleType) -> None:
    """Lets experts in MXFP4, which recipe mixed leaves in some layers, run where there is no Marlin."""
    from v4forge_vllm_cpu import experts

    method.CompressedTensorsW4A4Mxfp4MoEMethod.process_weights_after_loading = experts.prepare_mxfp4


def waiting(shm_broadcast: ModuleType) -> None:
    """Lets engine and worker sleep while they wait for each other: vLLM has each look for the other's message again and
    again, for a second after the last, on a core that here computes."""
    shm_broadcast.sched_yield = lambda: time.sleep(0.0005)  # type: ignore[attr-defined]


def poison(core: ModuleType) -> None:
    """Where the variable POISON is set, a request with that seed ends the engine, as one that meets a fault of a kernel
    does."""
    if not (seed := os.environ.get(POISON)):
        return
    theirs = core.EngineCore.add_request

    def add_request(self: Any, request: Any, request_wave: int = 0) -> None:
        if request.sampling_params and str(request.sampling_params.seed) == seed:
            os._exit(1)
        theirs(self, request, request_wave)

    core.EngineCore.add_request = add_request


def platform(cpu: type) -> None:
    """Lets vLLM's CPU platform register our kernels too, and chunk the prompts of a DeepSeek-V4; once in a process."""
    if hasattr(cpu, "with_v4forge"):
        return
    cpu.with_v4forge = True  # type: ignore[attr-defined]
    their_kernels = cpu.register_triton_kernel_overrides  # type: ignore[attr-defined]
    their_check = cpu.check_and_update_config  # type: ignore[attr-defined]

    def register_triton_kernel_overrides() -> None:
        """In each worker, where there is no Triton for a CPU."""
        from vllm.triton_utils import HAS_TRITON
        from vllm.triton_utils.dispatcher import register_kernels
        from vllm.utils import cpu_triton_utils

        from v4forge_vllm_cpu import metadata

        cpu_triton_utils._expand_kernel_impl = metadata.expand
        their_kernels()
        if not HAS_TRITON:
            register_kernels(metadata.KERNELS)
        metadata.complete_tile_schedule()
        metadata.skip_prompts_without_keys()

    def check_and_update_config(vllm_config: Any) -> None:
        """Without AMX vLLM turns chunked prefill off, but not its limit: a longer prompt would wait for ever."""
        model_config = vllm_config.model_config
        is_ours = getattr(getattr(model_config, "hf_config", None), "model_type", None) == "deepseek_v4"
        with mock.patch("torch.cpu._is_amx_tile_supported", lambda: True) if is_ours else nullcontext():
            their_check(vllm_config)
        # Engine and worker have what the server has imported, which takes each seven seconds anew.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    cpu.register_triton_kernel_overrides = staticmethod(register_triton_kernel_overrides)  # type: ignore[attr-defined]
    cpu.check_and_update_config = staticmethod(check_and_update_config)  # type: ignore[attr-defined]
