"""Templates filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from v4forge.reporting.tables import plain

TEMPLATES = Path(__file__).parent / "templates"


def rendered(template: str, escape: bool = True, **values: Any) -> str:
    """A template with these values; escape: as HTML. A name that there is no value for is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    return environment.get_template(template).render(values)
