"""Embed plots in a page, with the page's font and the colors of its style sheet, for light and dark schemes."""

from __future__ import annotations

import io
import itertools
import xml.etree.ElementTree as ET
from collections.abc import Callable

from markupsafe import Markup

from prune_distill.reporting.plots import COLORS, GRAY, Plot

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
# The page defines these for both schemes.
_VARIABLES = {
    **{color: f"var(--{name})" for name, color in COLORS.items()},
    GRAY: "var(--muted)",
    "#000000": "currentColor",
}
_LEFT_OUT = {f"{{{SVG}}}metadata", f"{{{SVG}}}style"}
_numbers = itertools.count()


def inline(plot: Plot, description: str, clean: Callable[[str], str] = str) -> Markup:
    """Render a plot as an SVG element.

    Args:
        plot: the plot.
        description: alternative text for screen readers.
        clean: applied to every text.
    """
    buffer = io.StringIO()
    plot.write(buffer)
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in _LEFT_OUT]:
            parent.remove(child)
    for gid, texts in plot.hover.items():
        _add_titles(root, gid, texts)
    # Plots of a page need unique ids, but matplotlib numbers the parts of each plot from 1.
    prefix = f"p{next(_numbers)}-"
    for element in root.iter():
        _adapt(element, prefix)
        if element.text and element.text.strip():
            element.text = clean(element.text)
    # The page sets the size; the viewBox sets the aspect ratio.
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", clean(description))
    return Markup(ET.tostring(root, encoding="unicode"))


def _add_titles(root: ET.Element, gid: str, texts: list[str]) -> None:
    """Add a title to each point of an artist, unless matplotlib omitted non-finite points."""
    artist = next((element for element in root.iter() if element.get("id") == gid), None)
    points = [] if artist is None else list(artist.iter(f"{{{SVG}}}use"))
    if len(points) == len(texts):
        for point, text in zip(points, texts, strict=True):
            ET.SubElement(point, f"{{{SVG}}}title").text = text


def _adapt(element: ET.Element, prefix: str) -> None:
    """Make ids unique in the page, and replace colors by variables of its style sheet."""
    for name, value in element.attrib.items():
        if name == "id":
            element.set(name, prefix + value)
        elif name == f"{{{XLINK}}}href":
            element.set(name, value.replace("#", f"#{prefix}"))
        elif name == "clip-path":
            element.set(name, value.replace("url(#", f"url(#{prefix}"))
        elif name == "style":
            for color, variable in _VARIABLES.items():
                value = value.replace(color, variable)
            element.set(name, value)
