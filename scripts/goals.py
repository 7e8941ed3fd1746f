"""Says what make can do, and whether it understood what it was told; the Makefile calls it before anything else.

    python -m scripts.goals help
    python -m scripts.goals help-serve
    python -m scripts.goals check artifact card PROFILE=flash GPUS=8

Standard library only: it runs before the environment exists. Exit code 2 for a target, a variable or a value that is
not there.
"""

from __future__ import annotations

from v4forge import makefile
from v4forge.errors import Parser, UserError, report, run_main


def main() -> int:
    parser = Parser(prog="python -m scripts.goals", description=__doc__)
    made = makefile.read()
    groups = [f"help-{group.lower()}" for group in made.main if group != makefile.START]
    parser.add_argument("action", choices=("check", "error", "help", *groups))
    parser.add_argument("words", nargs="*", help="what make was told: targets, NAME=value; of an error fact and hint")
    arguments = parser.parse_args()
    if arguments.action == "check":
        goals = [word for word in arguments.words if "=" not in word]
        given = makefile.parsed(word for word in arguments.words if "=" in word)
        if wrong := makefile.fault(made, goals, given):
            report(UserError(*wrong))
            return 2
        return 0
    if arguments.action == "error":
        report(UserError(*arguments.words))
        return 2
    group = arguments.action.partition("-")[2]
    print(*(makefile.group_help(made, group) if group else makefile.overview(made)), sep="\n")
    return 0


if __name__ == "__main__":
    run_main(main)
