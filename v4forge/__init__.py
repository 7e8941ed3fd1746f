"""DeepSeek-V4-Flash from its upstream bytes to a verified W4A16 + FP8 + BF16-MTP artifact, one layer at a time."""

import ctypes
import importlib
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from v4forge.api import Checkpoint, Settings, UserError, quantize_layer, verify

__all__ = ["Checkpoint", "Settings", "UserError", "quantize_layer", "verify"]


def __getattr__(name: str) -> Any:
    """The names of `api`, which loads torch, once somebody asks for one: https://peps.python.org/pep-0562/."""
    if name in __all__:
        return getattr(importlib.import_module("v4forge.api"), name)
    raise AttributeError(f"module 'v4forge' has no attribute {name!r}")


# Read when torch loads its OpenMP runtime. Threads that spin at barriers make these many small operations five times
# slower as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Tensors of some MB come and go by the thousand. malloc keeps their pages, up to 1 GiB, where it would give them back
# and have the kernel clear others each time: a forward pass on a CPU takes a third less.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
if hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 28)
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)

# A rank ends with the torchrun that started it, even if that is killed. Before the imports, which take seconds.
PR_SET_PDEATHSIG = 1  # linux/prctl.h
if "TORCHELASTIC_RUN_ID" in os.environ:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

# Both log at import that there is no GPU; which device is used is ours to say.
os.environ.setdefault("COMPRESSED_TENSORS_LOG_DISABLED", "true")
os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")

# What libraries read at import, and break on where it is another form: each variable with its form.
_FORMS = {
    "HF_HUB_DOWNLOAD_TIMEOUT": r"[0-9]+",
    "HF_HUB_ETAG_TIMEOUT": r"[0-9]+",
    "HF_DATASETS_IN_MEMORY_MAX_SIZE": r"[0-9]+(\.[0-9]+)?",
    "PYTORCH_JIT": r"[01]",
    "TQDM_MININTERVAL": r"[0-9]+(\.[0-9]+)?",
    "TQDM_MAXINTERVAL": r"[0-9]+(\.[0-9]+)?",
    "TORCH_LOGS": r"",  # what torch says of itself is no part of a run
    # We draw files, never windows; a notebook draws on its page, but no program that it starts.
    "MPLBACKEND": r"(?i:agg|svg|pdf)" + (r"|module://matplotlib_inline\..+" if "ipykernel" in sys.modules else ""),
}
for _name, _form in _FORMS.items():
    if (_value := os.environ.get(_name)) and not re.fullmatch(_form, _value):
        print(f"{_name}={_value!r} is not of this run's form: ignored", file=sys.stderr, flush=True)
        del os.environ[_name]
