"""The model card as an HTML page, rendered as the hub would: Markdown with tables, and of HTML only what folds."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup

from v4forge.reporting.rendering import rendered

FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
FOLDS = re.compile(r"&lt;(/?(?:details|summary))&gt;")


class _Renderer(RendererHTML):
    """Shows HTML as text, but for the tags of a folded part; tables scroll by themselves."""

    def html_block(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return FOLDS.sub(r"<\1>", html.escape(tokens[idx].content, quote=False))

    def html_inline(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return self.html_block(tokens, idx, options, env)

    def table_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return '<div class="scroll">' + self.renderToken(tokens, idx, options, env)

    def table_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return self.renderToken(tokens, idx, options, env) + "</div>"


def body(markdown: str) -> str:
    """Markdown, without a front matter, as HTML."""
    parser = MarkdownIt("commonmark", {"html": True}, renderer_cls=_Renderer).enable("table")
    return str(parser.render(markdown))


def page(card: str) -> str:
    """The card as one HTML document that needs no other file."""
    matter = FRONT_MATTER.match(card)
    shown = card[matter.end() :] if matter else card
    first = next((line for line in shown.splitlines() if line.startswith("# ")), "# Model card")
    values: Mapping[str, Any] = {
        "title": html.unescape(re.sub(r"\\(.)", r"\1", first.removeprefix("# "))),
        "front_matter": matter[1] if matter else "",
        "body": Markup(body(shown)),  # its renderer escapes
    }
    return rendered("card.html.j2", **values)
