"""DeepSeek-V4-Flash from its upstream bytes to a verified W4A16 + FP8 + BF16-MTP artifact, one layer at a time."""

import ctypes
import os
import signal

# Read when torch loads its OpenMP runtime. Threads that spin at barriers make these many small operations five times
# slower as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A rank ends with the torchrun that started it, even if that is killed. Before the imports, which take seconds.
PR_SET_PDEATHSIG = 1  # linux/prctl.h
if "TORCHELASTIC_RUN_ID" in os.environ:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

# Both log at import that there is no GPU; which device is used is ours to say.
os.environ.setdefault("COMPRESSED_TENSORS_LOG_DISABLED", "true")
os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")
