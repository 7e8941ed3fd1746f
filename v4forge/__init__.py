"""DeepSeek-V4-Flash from its upstream bytes to a verified W4A16 + FP8 + BF16-MTP artifact, one layer at a time."""

import ctypes
import os
import signal

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
