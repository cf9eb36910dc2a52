"""Render pages as self-contained HTML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prune_distill.atomic_files import write_text
from prune_distill.reporting.blocks import Page
from prune_distill.reporting.privacy import Privacy

_TEMPLATES = Path(__file__).resolve().parent / "templates"


def render(page: Page, privacy: Privacy) -> str:
    """Render a page as HTML. Every text is cleaned by `privacy` and escaped."""

    def finalize(value: Any) -> Any:
        return privacy.text(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    templates = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report.html.j2").render(page=page)


def write(page: Page, path: Path, privacy: Privacy) -> None:
    """Write a page atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(page, privacy))
