"""What is counted and found in the text of an answer: its code, words, sentences, paragraphs, language, repetitions."""

from __future__ import annotations

import re
from collections import Counter

from v4forge.serving.client import short

# The commonest words of each language that are not words of the others.
LANGUAGES = {
    "english": "the of and to is that it with as was for on are by this be from have",
    "german": "der die das und ist nicht ein eine einen mit sich auf den dem im zu sie von als",
    "french": "le les et est une dans que qui pour pas sur avec elle il ce des du au",
    "spanish": "el los las y es una que por con para del se no su lo al como más",
}
LEAST_SHARE = 0.06  # of a text's words; terse lists have few of the commonest
PHRASE = 4  # words
MOST_REPEATED = 0.15  # of its phrases
BLOCK = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
# A point within a number ends no sentence.
END = re.compile(r"[.!?…]+(?=[\"'”’“»)\]]*(?:\s|$))")


def code(answer: str, wanted: str) -> str:
    """The code in an answer: of its code blocks the one in which `wanted` is found, else the longest; without any,
    the whole answer."""
    blocks = [match[2] for match in BLOCK.finditer(answer)]
    holding = [block for block in blocks if re.search(wanted, block, re.IGNORECASE)]
    return max(holding or blocks, key=len, default=answer)


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def sentences(text: str) -> list[str]:
    return [each.strip() for each in END.split(text) if words(each)]


def paragraphs(text: str) -> list[str]:
    return [each for each in re.split(r"\n\s*\n", text) if each.strip()]


def language(text: str) -> tuple[str, float]:
    """The likeliest of LANGUAGES, and the share of the text's words that are its commonest."""
    counts = Counter(word.casefold() for word in words(text))
    total = max(1, counts.total())
    shares = {name: sum(counts[word] for word in common.split()) / total for name, common in LANGUAGES.items()}
    best = max(shares, key=lambda name: shares[name])
    return best, shares[best]


def repeated(text: str) -> str:
    """The sentence that comes twice, or how many of its phrases do; "" where that is as it should be."""
    said = [" ".join(words(each)).casefold() for each in sentences(text)]
    twice = next((each for each, count in Counter(said).items() if count > 1 and len(each.split()) >= PHRASE), "")
    if twice:
        return f"twice: {short(twice)}"
    spoken = [word.casefold() for word in words(text)]
    phrases = Counter(tuple(spoken[at : at + PHRASE]) for at in range(len(spoken) - PHRASE + 1))
    share = 1 - len(phrases) / phrases.total() if phrases else 0.0
    return f"{share:.0%} of its phrases of {PHRASE} words are repeated" if share > MOST_REPEATED else ""
