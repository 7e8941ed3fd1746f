"""What you run: one program a stage, `python -m scripts.<stage>`."""

import v4forge  # noqa: F401, before torch: it sets the OpenMP wait policy
