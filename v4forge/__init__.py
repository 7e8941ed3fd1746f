"""DeepSeek-V4-Flash from its upstream bytes to a verified W4A16 + FP8 + BF16-MTP artifact, one layer at a time."""

import os

# Read when torch loads its OpenMP runtime. Threads that spin at barriers make these many small operations five times
# slower as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
