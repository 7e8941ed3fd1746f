"""torchrun without its tracebacks: a rank has said why it ended, and who stopped the run knows it.

python -m v4forge.pipeline.torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 8 -m scripts.calibrate …
"""

from __future__ import annotations

import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from v4forge import launched


def main() -> int:
    for name in os.environ.keys() - launched.without().keys():  # torchrun takes PET_NNODES, say, for its own options
        del os.environ[name]
    try:
        run(parse_args(None))
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except KeyboardInterrupt:  # before it has begun
        return 128 + signal.SIGINT
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return max(codes) if max(codes) > 0 else 128 - min(codes)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an agent that was stopped holds threads that Python would wait for
