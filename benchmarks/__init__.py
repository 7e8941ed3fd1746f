"""What is measured, and how: one program a measurement, `python -m benchmarks.<name>`."""

import v4forge  # noqa: F401, before torch: it sets the OpenMP wait policy
