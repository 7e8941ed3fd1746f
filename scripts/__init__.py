"""What you run: one program a stage, `python -m scripts.<stage>`."""

import v4forge  # noqa: F401, before torch: it sets the OpenMP wait policy
from v4forge.errors import interrupts_in_one_line

interrupts_in_one_line()  # of the imports, which take seconds
