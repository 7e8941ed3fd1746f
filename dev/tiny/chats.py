"""Conversations about docstrings: the chats that the embedded model is trained and calibrated on."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from typing import Any


def name_hash(text: str) -> int:
    """64 bits of the text's SHA-256: decides where chance would, the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def conversations(file: str, source: str) -> Iterator[dict[str, Any]]:
    """`{"messages": […]}` (and `tools`) for the documented functions and classes of the source file `file`.

    Most ask what a name does and get its docstring; by the hash of the name, one in eight reasons first, one in eight
    goes on to the signature, and one in sixteen looks the answer up with a tool.
    """
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for name, signature, docstring in _documented(source, module):
        question = {"role": "user", "content": _QUESTIONS[name_hash(name) % len(_QUESTIONS)].format(name=name)}
        summary = docstring.split("\n\n")[0]
        match name_hash(name + " form") % 16:
            case 0:
                call = {"name": "lookup", "arguments": json.dumps({"name": name})}
                yield {
                    "tools": [_LOOKUP],
                    "messages": [
                        question,
                        {"role": "assistant", "tool_calls": [{"id": "0", "type": "function", "function": call}]},
                        {"role": "tool", "tool_call_id": "0", "content": docstring},
                        {"role": "assistant", "content": summary},
                    ],
                }
            case 1 | 2:
                where = f"`{name}` is in the module `{module}`."
                reasoning = f"{where} It is declared as `{signature}`. Its docstring says what it does."
                yield {"messages": [question, {"role": "assistant", "reasoning": reasoning, "content": docstring}]}
            case 3 | 4:
                yield {
                    "messages": [
                        question,
                        {"role": "assistant", "content": docstring},
                        {"role": "user", "content": "How is it declared?"},
                        {"role": "assistant", "content": f"```python\n{signature}\n```"},
                    ]
                }
            case _:
                yield {"messages": [question, {"role": "assistant", "content": docstring}]}


_QUESTIONS = (
    "What does `{name}` do?",
    "Explain `{name}`.",
    "What is `{name}` for?",
    "Give me the documentation of `{name}`.",
)
_LOOKUP = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Returns the docstring of a function or class.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}


def _documented(source: str, module: str) -> Iterator[tuple[str, str, str]]:
    """(qualified name, declaration, docstring) of a module's public functions, classes and methods."""

    def visit(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str, str]]:
        for child in node.body:
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if child.name.startswith("_"):
                continue
            name = f"{prefix}.{child.name}"
            docstring = ast.get_docstring(child)
            if docstring and len(docstring) >= 40:
                yield name, _declaration(child), docstring
            if isinstance(child, ast.ClassDef):
                yield from visit(child, name)

    try:
        yield from visit(ast.parse(source), module)
    except SyntaxError:  # lib2to3 carries a file or two of Python 2
        return


def _declaration(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"def {node.name}({ast.unparse(node.args)})"
