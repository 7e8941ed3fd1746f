"""Which of our modules determine bytes: all that a module imports, and what those import, read from their text.

Left out are the modules that no package holds, v4forge/*.py: they find files and machines, count and report, and see no
value of a tensor. Of the packages only what writes reports is left out, below. An import within a function counts; one
for type checkers alone does not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

from v4forge.checkout import ROOT

PACKAGE = "v4forge"
REPORTS = {"quantization/layer_reports"}


@cache
def modules(first: str) -> tuple[str, ...]:
    """In order of their names, which are paths below v4forge/ without .py, like `first`, which is one of them."""
    found: set[str] = set()
    ahead = [first]
    while ahead:
        name = ahead.pop()
        if name in found or name in REPORTS or not _is_module(name):
            continue
        found.add(name)
        ahead += imports((ROOT / PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    return tuple(sorted(name for name in found if "/" in name))


def imports(source: str) -> Iterator[str]:
    """What a module's text may import of ours, at run time; some of the names are not of modules."""
    for node in _run(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (n.removeprefix(f"{PACKAGE}.").replace(".", "/") for n in names if n.startswith(f"{PACKAGE}."))


def _run(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `tree`, without those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _run(node)


def _is_module(name: str) -> bool:
    return (ROOT / PACKAGE / f"{name}.py").is_file()
