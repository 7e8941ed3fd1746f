"""transformers imported without what only whole models need of it: to be sharded, compiled, trained, served in FP8.

A decoder layer uses none of that, and it is half of what importing transformers' modeling files loads:
torch.distributed.tensor, torch._dynamo with sympy, scipy.optimize. Within `lean(module)` names of the modules in LAZY
are imported on first use, which Python 3.15 calls a lazy import (https://peps.python.org/pep-0810/). Nothing is left
out: who uses such a name, whenever, uses the real one. Where another version of transformers uses one while it is
imported, it is imported as usual from there on, and tests/scripts/test_startup.py fails. Where the import fails so,
because some package wants more of a module in LAZY than names, everything is imported as usual.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

# What is imported from these is called, looked into or subclassed; none is a package that others import modules of.
LAZY = (
    "torch._dynamo._trace_wrapped_higher_order_op",  # for masks that vmap makes
    "transformers.distributed.fsdp",
    "transformers.distributed.sharding_utils",
    "transformers.distributed.tensor_parallel",
    "transformers.integrations.deepgemm",  # what these define is marked for torch.compile
    "transformers.integrations.finegrained_fp8",
    "transformers.integrations.flash_paged",
    "transformers.integrations.flex_attention",
    "transformers.integrations.sonicmoe",
    # losses of object detection, with scipy.optimize
    *(f"transformers.loss.loss_{name}" for name in ("d_fine", "deformable_detr", "deimv2", "for_object_detection")),
    *(f"transformers.loss.loss_{name}" for name in ("grounding_dino", "lw_detr", "rf_detr", "rt_detr")),
)
COMPILER = "torch._dynamo"


@contextmanager
def lean(module: str) -> Iterator[None]:
    """Loads `module` for the imports of the block; names that it imports from the modules of LAZY wait until they are
    used, if those are not loaded yet. Raises nothing: what the plain import raises, the block's imports do."""
    before = set(sys.modules)
    with _stand_ins():
        try:
            import_module(module)
        except Exception:
            failed = True
        else:
            failed = False
            yield
    if failed:
        roots = {name.partition(".")[0] for name in (module, *LAZY)} - {"torch"}
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in roots:  # half of them may be there
                del sys.modules[name]
        yield


@contextmanager
def _stand_ins() -> Iterator[None]:
    sys.modules.update({name: _StandIn(name) for name in LAZY if name not in sys.modules})
    mark = torch.compiler.allow_in_graph  # imports COMPILER, and transformers' base class of all models calls it
    if COMPILER not in sys.modules:
        torch.compiler.allow_in_graph = _allow_later
    try:
        yield
    finally:
        torch.compiler.allow_in_graph = mark
        _remove_stand_ins()


def _remove_stand_ins() -> None:
    for name in LAZY:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


class _StandIn(ModuleType):
    """A module to import names from, each of which is looked up in the real one when it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks for
            raise AttributeError(name)
        return _Name(self.__name__, name)


class _Name:
    """A name of a module, which is imported when the name is called, looked into, subclassed or compared with."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _value(self) -> Any:
        _remove_stand_ins()  # the module may import any of the others
        return getattr(import_module(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._value()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value(), name)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._value())

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[Any, ...]:
        return (self._value(),)


def _allow_later(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.allow_in_graph for a compiler that is not there yet: it is told when it is imported."""
    _telling.allowed.append(function)
    if _telling not in sys.meta_path:
        sys.meta_path.insert(0, _telling)
    return function


class _Telling(MetaPathFinder):
    """Finds COMPILER as the other finders do, and has it told, once it is imported, what is allowed in its graphs."""

    def __init__(self) -> None:
        self.allowed: list[Callable[..., Any]] = []

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COMPILER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def and_tell(module: ModuleType) -> None:
            execute(module)
            while self.allowed:
                module.allow_in_graph(self.allowed.pop())

        spec.loader.exec_module = and_tell  # type: ignore[method-assign]
        return spec


_telling = _Telling()
