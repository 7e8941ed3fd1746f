"""A corpus as it is written down: files of lines or texts, a row's forms, and the document that each row is."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from v4forge.errors import UserError
from v4forge.files import check_no_pointer
from v4forge.model import chat_format

DOCUMENT_BREAK = "\f\n"  # between the documents of a .txt file
BAD_TEXT = ("refuse", "replace")
# The forms of a row, and the fields that are read of one.
FORMS = {"messages": ("tools",), "conversations": ("tools", "system"), "text": ()}
# Who speaks in ShareGPT's form, by the names that data sets give them.
SPEAKERS = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard", "claude", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
}
# Half of a UTF-16 pair: JSON can write it, and no text holds it.
SURROGATE = re.compile("[\ud800-\udfff]")

_HINT = 'write {"text": "..."} or {"messages": [{"role": "user", "content": "..."}]}, one object a line'
_TURN_HINT = 'write {"from": "human", "value": "..."}, as ShareGPT does'
_TOOLS_HINT = 'write "tools": [{"type": "function", "function": {...}}]'


def _from_json(value: Any) -> Any:
    """A list that a data set keeps as JSON, because its items are of different forms."""
    if isinstance(value, str) and value.strip():
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value or None


class Row(BaseModel):
    """An object of a corpus, of which other fields are not read; what may be left out may be null."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, defer_build=True)

    text: str | None = None
    messages: list[Any] | None = None
    conversations: list[Any] | None = None
    system: str | None = None  # beside `conversations`
    tools: Annotated[list[Any] | None, BeforeValidator(_from_json)] = None


class Turn(BaseModel):
    """A turn of ShareGPT's form."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, defer_build=True)

    value: str | None = None


TOLD = {
    "text": ("`text` is empty or not a string", _HINT),
    "messages": ("`messages` is not a list", _HINT),
    "conversations": ("`conversations` is not a list", _HINT),
    "system": ("`system` is not a string", 'write "system": "..."'),
    "tools": ("`tools` is not a list", _TOOLS_HINT),
}


def document_of(row: Any, bad_text: str = "refuse") -> str:
    """The text or chat prompt of one corpus object; reasoning is shown if it has any.

    bad_text: whether half of a UTF-16 pair is an error, "refuse", or becomes U+FFFD, "replace". Raises UserError.
    """
    try:
        return _sound(_document(_cleaned(row, bad_text)), bad_text)  # JSON within a row may hold another half
    except RecursionError:
        raise UserError("nested too deeply", "flatten it, or leave the row out") from None


def _document(row: Any) -> str:
    present = [form for form in FORMS if isinstance(row, dict) and row.get(form) is not None]
    if not present:
        raise UserError("neither a text nor messages", _HINT)
    if len(present) > 1:
        what = "both a text and messages" if "text" in present else "both messages and conversations"
        raise UserError(what, _HINT)
    try:
        read = Row.model_validate({name: row.get(name) for name in (*present, *FORMS[present[0]])})
    except ValidationError as error:
        raise UserError(*TOLD[str(error.errors()[0]["loc"][0])]) from None
    if read.text is not None:
        if not read.text.strip():
            raise UserError(*TOLD["text"])
        return read.text
    messages = read.messages if read.messages is not None else _messages(read.conversations or [], read.system)
    return chat_format.encode_messages(messages, thinking=chat_format.has_reasoning(messages), tools=read.tools)


def _messages(turns: Sequence[Any], system: str | None) -> list[dict[str, Any]]:
    """The messages of a conversation in ShareGPT's form; one whose turns have roles is in the other form already."""
    found = [_message(turn, index) for index, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *found] if system else found


def _message(turn: Any, index: int) -> Any:
    if isinstance(turn, dict) and "role" in turn:
        return turn
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str):
        raise UserError(f"turn {index} does not say who speaks", _TURN_HINT)
    role = SPEAKERS.get(speaker.lower())
    if role is None:
        raise UserError(f"turn {index} is from {speaker!a}", f"use one of {', '.join(SPEAKERS)}")
    try:
        value = Turn.model_validate(turn).value or ""
    except ValidationError:
        raise UserError(f"turn {index}: its value is not a string", _TURN_HINT) from None
    if speaker.lower() == "function_call":
        return {"role": role, "content": "", "tool_calls": [{"function": call} for call in _calls(value, index)]}
    return {"role": role, "content": value}


def _calls(value: str, index: int) -> list[Any]:
    """The calls of a `function_call` turn: JSON of one, or of a list."""
    try:
        calls = json.loads(value)
    except ValueError:
        raise UserError(
            f"turn {index}: a function_call that is not JSON", 'write {"name": …, "arguments": …}'
        ) from None
    return calls if isinstance(calls, list) else [calls]


def _sound(text: str, bad_text: str) -> str:
    if not (half := SURROGATE.search(text)):
        return text
    if bad_text == "replace":
        return SURROGATE.sub("\ufffd", text)
    raise UserError(f"half of a UTF-16 pair, {half[0]!a}, which is no text", "correct it, or pass --bad-text replace")


def read_documents(path: Path, bad_text: str = "refuse") -> list[str]:
    """The documents of a .jsonl or .txt file, plain or .gz, in file order. Raises UserError, for a bad line with
    `file:line`.

    bad_text: what becomes of half a UTF-16 pair and of bytes that are not UTF-8, as for `document_of`.
    """
    if not path.is_file():
        raise UserError(f"the corpus {path} does not exist", "pass --corpus a .jsonl or .txt file")
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if kind not in (".jsonl", ".txt"):
        raise UserError(f"the corpus {path} is neither .jsonl nor .txt", "convert it to one of the two and name it so")
    check_no_pointer(path)
    text = _decoded(path, bad_text)
    if kind == ".txt":
        documents = [document for document in text.split(DOCUMENT_BREAK) if document.strip()]
    else:
        # Not splitlines(): it also breaks at characters that JSON allows inside a string.
        documents = list(_documents_of_lines(path, text.rstrip().split("\n") if text.strip() else [], bad_text))
    if not documents:
        raise UserError(f"{path} holds no document", "pass --corpus a file with text in it")
    return documents


def _decoded(path: Path, bad_text: str) -> str:
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig", errors="replace" if bad_text == "replace" else "strict")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        fact = f"{path}:{line}: it is not UTF-8 at byte {error.start}"
        raise UserError(fact, "convert the file to UTF-8, or pass --bad-text replace") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not gzip, or broke off: {error}", "copy it again, or unpack it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "make it a readable file") from None


def _documents_of_lines(path: Path, lines: Sequence[str], bad_text: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield document_of(_row(line), bad_text)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error.fact}", error.hint) from None


def _row(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})" if line.strip() else "an empty line", _HINT) from None


def _cleaned(value: Any, bad_text: str) -> Any:
    """A value of JSON whose texts, names too, are text."""
    if isinstance(value, str):
        return _sound(value, bad_text)
    if isinstance(value, list):
        return [_cleaned(each, bad_text) for each in value]
    if isinstance(value, dict):
        return {_cleaned(name, bad_text): _cleaned(each, bad_text) for name, each in value.items()}
    return value
