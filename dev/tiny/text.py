"""The texts and the tokenizer of the embedded model, made from the Python standard library.

The standard library's sources and documentation are text that every developer has, in one licence that allows passing
it on. They are cut into three parts that share no document and no passage: what the model is trained on (not
committed), what calibration reads and what quality is measured on (both committed). Everything is decided by hashes
of names, so that the same Python release gives the same files; `TEXTS.md`, written next to them, names the release
and the documents.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import re
import shutil
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dev.tiny.chats import conversations, name_hash
from v4forge.errors import UserError
from v4forge.model import chat_format
from v4forge.model.corpus import encode_documents, load_tokenizer
from v4forge.model.corpus_rows import DOCUMENT_BREAK, document_of, read_documents

VOCAB_SIZE = 1024

# V4's added tokens as its chat format and its predecessors' tokenizers name them, in the order of the ids that they
# get here. Only the first four are marked special, which hides a token from decoded text: a reasoning or tool parser
# must see the others.
HIDDEN_TOKENS = (chat_format.BOS, chat_format.EOS, chat_format.PAD, "<|EOT|>")
VISIBLE_TOKENS = (
    chat_format.USER,
    chat_format.ASSISTANT,
    chat_format.THINK,
    chat_format.END_THINK,
    chat_format.DSML,
    "<｜latest_reminder｜>",
    *(f"<｜{task}｜>" for task in ("action", "query", "authority", "domain", "title", "read_url")),
    *(f"<｜fim▁{place}｜>" for place in ("hole", "begin", "end")),
    *(f"<｜search▁{place}｜>" for place in ("begin", "end")),
    *(f"<｜tool▁{what}▁{place}｜>" for what in ("calls", "call", "outputs", "output") for place in ("begin", "end")),
    "<｜tool▁sep｜>",
)

# What a word is to the tokenizer: at most three digits; a line break with the next line's indent, because indents
# repeat; a name with the space before it; a run of one kind of anything else.
_WORDS = r"\p{N}{1,3}|\n+ *| ?[\p{L}\p{M}_]+| ?[^\s\p{L}\p{M}\p{N}_]+|\s+"

_EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
_EXCLUDED_FILES = {"html/entities.py"}  # a table
_GENERATED = "Character Mapping Codec"  # in the head of every character map of `encodings`
_TOPICS = "pydoc_data/topics.py"  # the language reference and parts of the library's, as one dictionary

# Bytes of each part: documentation prose and sources, and conversations for calibration.
HELDOUT_BYTES = {"prose": 36_000, "source": 84_000}
CALIBRATION_BYTES = {"prose": 45_000, "source": 100_000}
CONVERSATION_BYTES = 90_000
_FAMILY_BYTES = range(1_500, 12_000)  # of what goes into a committed part: a context, and variety
_CHAT_SHARE = 0.1  # of the training text

# A passage this long in two documents puts both into the same part; one in more documents than this is a notice or an
# idiom.
_PASSAGE_CHARS = 160
_COMMON_PASSAGE_DOCUMENTS = 8

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜></think>' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}"
)


@dataclass(frozen=True)
class Document:
    """A source file, or one topic of the documentation: `pydoc_data/topics.py#assert`."""

    name: str
    text: str

    @property
    def kind(self) -> str:
        return "prose" if "#" in self.name else "source"

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True)
class Parts:
    """The documents of each use; calibration reads `calibration` as text, `talkative` as chats on its docstrings."""

    train: list[Document]
    calibration: list[Document]
    talkative: list[Document]
    heldout: list[Document]


def build(out: Path, train_out: Path, tokens_out: Path | None = None) -> dict[str, int]:
    """Writes the tokenizer, the committed texts and their licence into `out` and the training text into `train_out`.

    The training text is UTF-8, every document between BOS and EOS. With `tokens_out`, the training and the held-out
    text are also written there as token ids: train.npy and heldout.npy, [tokens] uint16. Returns the sizes, by name.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    licence = stdlib / "LICENSE.txt"
    if not licence.is_file():
        raise UserError("this Python's standard library has no LICENSE.txt", "use a Python built from its own release")
    parts = split(standard_library(stdlib))
    tokenizer = train_tokenizer(document.text for document in parts.train)

    out.mkdir(parents=True, exist_ok=True)
    train_out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", _tokenizer_config())
    _write_json(out / "generation_config.json", _generation_config())
    shutil.copyfile(licence, out / "LICENSE.PSF")
    (out / "heldout.txt").write_text(DOCUMENT_BREAK.join(d.text for d in parts.heldout), encoding="utf-8")
    lines = [{"text": d.text} for d in parts.calibration] + [
        c for d in parts.talkative for c in conversations(d.name, d.text)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _shuffled(lines))
    (out / "calibration.jsonl").write_text(text, encoding="utf-8")
    train_out.write_text("".join(_training_texts(parts.train)), encoding="utf-8")

    sizes = {
        "train_documents": len(parts.train),
        "train_bytes": train_out.stat().st_size,
        "calibration_lines": len(lines),
        "calibration_bytes": (out / "calibration.jsonl").stat().st_size,
        "heldout_documents": len(parts.heldout),
        "heldout_bytes": (out / "heldout.txt").stat().st_size,
    }
    if tokens_out is not None:
        tokens_out.mkdir(parents=True, exist_ok=True)
        texts = {"train": train_tokens(out, train_out), "heldout": heldout_tokens(out, out / "heldout.txt")}
        for name, tokens in texts.items():
            np.save(tokens_out / f"{name}.npy", tokens)
            sizes[f"{name}_tokens"] = len(tokens)
    sha256 = hashlib.sha256(train_out.read_bytes()).hexdigest()
    (out / "TEXTS.md").write_text(_description(parts, sizes, sha256), encoding="utf-8")
    return sizes


def train_tokens(tokenizer_dir: Path, train_text: Path) -> np.ndarray:
    """The training text as token ids: [tokens] uint16, every document beginning with BOS and ending with EOS."""
    tokenizer = load_tokenizer(tokenizer_dir)
    return _ids(
        tokenizer,
        [chat_format.BOS + text for text in train_text.read_text(encoding="utf-8").split(chat_format.BOS)[1:]],
    )


def heldout_tokens(tokenizer_dir: Path, heldout: Path) -> np.ndarray:
    """The held-out text as token ids: [tokens] uint16, every document beginning with BOS and ending with EOS."""
    tokenizer = load_tokenizer(tokenizer_dir)
    return np.concatenate([np.array(ids, np.uint16) for ids in encode_documents(tokenizer, read_documents(heldout))])


def standard_library(stdlib: Path) -> list[Document]:
    """Python sources and documentation topics under `stdlib`, in name order, without tests, tables and non-UTF-8."""
    documents = []
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).as_posix()):
        name = path.relative_to(stdlib).as_posix()
        folders = set(name.split("/")[:-1])
        machine_made = name.startswith(("_sysconfigdata", "config-")) or name in _EXCLUDED_FILES
        if machine_made or folders & _EXCLUDED_FOLDERS:
            continue
        try:
            text = path.read_bytes().decode().replace("\r\n", "\n").replace("\f", "")
        except UnicodeDecodeError:
            continue
        if name == _TOPICS:
            documents += [Document(f"{name}#{topic}", text) for topic, text in sorted(_topics(text).items())]
        elif text.strip() and _GENERATED not in text[:2000]:
            documents.append(Document(name, text))
    return documents


def split(documents: list[Document]) -> Parts:
    """Deals the documents out in the order of their names' hashes, those that share a passage together."""
    rest = sorted(_families(documents), key=lambda family: name_hash(family[0].name))

    def take(kind: str, budget_bytes: int, cost: Callable[[Document], int]) -> list[Document]:
        """Removes from `rest` the first families that fit into the budget."""
        taken: list[Document] = []
        for family in list(rest):
            price = sum(cost(document) for document in family)
            fits = 0 < price <= budget_bytes and sum(document.bytes for document in family) in _FAMILY_BYTES
            if fits and all(document.kind == kind for document in family):
                taken += family
                rest.remove(family)
                budget_bytes -= price
        return taken

    heldout = [d for kind, budget in HELDOUT_BYTES.items() for d in take(kind, budget, lambda d: d.bytes)]
    calibration = [d for kind, budget in CALIBRATION_BYTES.items() for d in take(kind, budget, lambda d: d.bytes)]
    talkative = take(
        "source", CONVERSATION_BYTES, lambda d: sum(_bytes(line) for line in conversations(d.name, d.text))
    )
    train = sorted((d for family in rest for d in family), key=lambda document: document.name)
    return Parts(train, calibration, talkative, heldout)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens: V4's added tokens (BOS 0, EOS 1, PAD 2), then the bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    hidden = [AddedToken(token, special=True, normalized=False) for token in HIDDEN_TOKENS]
    visible = [AddedToken(token, special=False, normalized=False) for token in VISIBLE_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=hidden + visible,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer marks every token it was given as special; only the hidden ones are.
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in HIDDEN_TOKENS
    return Tokenizer.from_str(json.dumps(content, ensure_ascii=False))


def _training_texts(documents: list[Document]) -> Iterator[str]:
    """Every document, and chats on their docstrings up to their share of the text, in hashed order."""
    plain = [chat_format.BOS + document.text + chat_format.EOS for document in documents]
    budget_bytes = sum(document.bytes for document in documents) * _CHAT_SHARE / (1 - _CHAT_SHARE)
    chats = []
    for line in _shuffled([line for document in documents for line in conversations(document.name, document.text)]):
        if budget_bytes <= 0:
            break
        chats.append(document_of(line))
        budget_bytes -= len(chats[-1].encode())
    yield from _shuffled(plain + chats)


def _topics(source: str) -> dict[str, str]:
    """The dictionary that the module assigns to `topics`; read, not imported: the stdlib may be another Python's."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "topics":
            return ast.literal_eval(node.value)
    return {}


def _families(documents: list[Document]) -> list[list[Document]]:
    """Documents grouped so that no uncommon passage occurs in two groups; each group, and each list, in name order."""
    holders: dict[str, set[int]] = defaultdict(set)
    for index, document in enumerate(documents):
        for passage in re.split(r"\n\s*\n", document.text):
            words = " ".join(passage.split())
            if len(words) >= _PASSAGE_CHARS:
                holders[words].add(index)
    parent = list(range(len(documents)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for indices in holders.values():
        if len(indices) <= _COMMON_PASSAGE_DOCUMENTS:
            roots = sorted({root(index) for index in indices})
            for other in roots[1:]:
                parent[other] = roots[0]
    families: dict[int, list[Document]] = defaultdict(list)
    for index, document in enumerate(documents):
        families[root(index)].append(document)
    return list(families.values())


def _ids(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array(encoding.ids, np.uint16) for encoding in encodings])


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": chat_format.BOS,
        "eos_token": chat_format.EOS,
        "pad_token": chat_format.PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1048576,
        "chat_template": _CHAT_TEMPLATE,
    }


def _generation_config() -> dict[str, Any]:
    return {
        "_from_model_config": True,
        "bos_token_id": 0,
        "do_sample": True,
        "eos_token_id": 1,
        "temperature": 1.0,
        "top_p": 1.0,
    }


def _description(parts: Parts, sizes: dict[str, int], train_sha256: str) -> str:
    def names(documents: list[Document]) -> str:
        return "\n".join(f"- `{document.name}`" for document in documents)

    kept_by_hash = f"not kept; sha256 `{train_sha256}`"
    breaks = "a form feed and a line break between documents"
    return f"""# Texts of the embedded model

From the standard library of Python {platform.python_version()}, under the licence in LICENSE.PSF; written by
`python -m dev.make_tiny_text`. `file.py#topic` is one topic of the documentation that `help()` shows.

| text | documents | bytes | file |
|---|---|---|---|
| training, {_CHAT_SHARE:.0%} of it chats | {sizes["train_documents"]:,} | {sizes["train_bytes"]:,} | {kept_by_hash} |
| calibration | {sizes["calibration_lines"]:,} | {sizes["calibration_bytes"]:,} | calibration.jsonl |
| held out | {sizes["heldout_documents"]:,} | {sizes["heldout_bytes"]:,} | heldout.txt, {breaks} |

No document is in two of them, and no passage of {_PASSAGE_CHARS} characters or more, unless over
{_COMMON_PASSAGE_DOCUMENTS} documents share it (licence notices). The chats ask about docstrings of the training text.

## Held out

{names(parts.heldout)}

## Calibration

{names(parts.calibration)}

As conversations on their docstrings:

{names(parts.talkative)}
"""


def _shuffled(items: list[Any]) -> list[Any]:
    """The items in the order of their contents' hashes."""
    return sorted(items, key=lambda item: name_hash(json.dumps(item, ensure_ascii=False, sort_keys=True)))


def _bytes(line: dict[str, Any]) -> int:
    return len(json.dumps(line, ensure_ascii=False).encode())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
