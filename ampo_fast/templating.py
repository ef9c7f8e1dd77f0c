"""Fills the templates of what the package writes for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ampo_fast.jsonl import without_nan

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, /, **values: Any) -> str:
    """The filled template; .html.j2 escapes everything that goes in. A value that is not given is an error."""
    environment = jinja2.Environment(
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["script_json"] = script_json
    source = (_TEMPLATES / template).read_text(encoding="utf-8")
    return environment.from_string(source).render(**values)


def script_json(value: Any) -> Markup:
    """JSON to stand inside <script type="application/json">: "<" is escaped, so that no text can end the element."""
    return Markup(json.dumps(without_nan(value), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))
