r"""Two or more processes add their numbers, and compare the sum with what it has to be: can these GPUs talk?

    NCCL_NVLS_ENABLE=0 python -m torch.distributed.run --standalone --local-addr 127.0.0.1 \
        --nproc-per-node 2 -m scripts.all_reduce

--backend gloo is for processes without GPUs; it says nothing about NCCL.
"""

from __future__ import annotations

from v4forge.errors import run_main

from .cli import parser_for


def main() -> None:
    parser = parser_for("all_reduce", __doc__)
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl", help="default: %(default)s")
    args = parser.parse_args()

    from v4forge.pipeline import all_reduce

    all_reduce.run(args.backend)


if __name__ == "__main__":
    run_main(main)
