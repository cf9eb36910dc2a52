"""How all plots look. matplotlib is imported only where one is drawn."""

from __future__ import annotations

from typing import Any

# Reads on white and on black, so that a page needs a single picture.
GREY = "#808080"


def figure(panels: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of `size` inches with so many panels in a row, and its axes: grey, two sides, a faint grid."""
    from matplotlib.figure import Figure

    made = Figure(figsize=size, layout="constrained")
    row = made.subplots(1, panels, squeeze=False)[0]
    for axes in row:
        axes.tick_params(colors=GREY)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
        axes.grid(color=GREY, alpha=0.2)
    return made, row


def save_svg(drawn: Any, target: Any) -> None:
    """Writes a figure to a path or a file object, without the date."""
    drawn.savefig(target, format="svg", transparent=True, metadata={"Date": None})
