"""What mkdocs does to the pages besides: README.md is the first one; what a page names outside of docs/ is a picture,
which the site takes along, or a file where the source is published.

https://www.mkdocs.org/dev-guide/plugins/#events
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

from v4forge import pins
from v4forge.checkout import ROOT

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s]+)(?=\))")
PICTURES = (".png", ".svg")
INDEX = "index.md"
log = get_plugin_logger(__name__)


def on_config(config: Any) -> Any:
    """Headings get the anchors that GitHub gives them."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the first page, and the pictures that pages show from elsewhere."""
    files.append(File.generated(config, INDEX, content=(ROOT / "README.md").read_text(encoding="utf-8")))
    outside = {
        name
        for page in files.documentation_pages()
        if page.src_uri.endswith(".md")
        for link in LINK.findall(page.content_string)
        if (name := _outside(page.src_uri, link)).endswith(PICTURES)
    }
    for name in sorted(outside):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with the links of the site."""

    def link(found: re.Match[str]) -> str:
        name, _, anchor = found[1].partition("#")
        path = _path(page.file.src_uri, name)
        if path.startswith("docs/"):
            there = posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(page.file.src_uri) or ".")
            return f"{there}#{anchor}" if anchor else there
        if path == "README.md":
            return INDEX
        if not (ROOT / path).exists():
            log.warning(f"{page.file.src_uri} names {path}, which is not there")
        return path if path.endswith(PICTURES) else f"{pins.read()['PROJECT_URL']}/blob/main/{path}"

    return LINK.sub(link, markdown)


def _path(page: str, link: str) -> str:
    """What a link of a page names, from the checkout's folder."""
    folder = "" if page == INDEX else posixpath.join("docs", posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(folder, link)) if link else posixpath.join("docs", page)


def _outside(page: str, link: str) -> str:
    """The same where it is not below docs/, else ""."""
    path = _path(page, link.partition("#")[0])
    return "" if path.startswith("docs/") or not Path(ROOT / path).is_file() else path
