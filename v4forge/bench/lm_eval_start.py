"""lm-eval's command line with the tasks in --include_path and no others: a program for the environment that has
lm-eval, without the rest of v4forge.

python lm_eval_start.py run …: as `python -m lm_eval run …`, which first reads its own 14,000 files of tasks, in eight
seconds or more, and has no option against it. A derived task includes the original by its path.
"""

from __future__ import annotations

import functools


def main() -> None:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    cli_evaluate()


if __name__ == "__main__":
    main()
