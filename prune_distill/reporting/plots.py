"""Common style of all plots, and the plots that pruning and the report share. matplotlib is imported on first use. No
torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prune_distill.atomic_files import replace_file
from prune_distill.config.wording import ranges
from prune_distill.reporting import Json

# Readable on white and on black, so that a file needs only one image; a page overrides it.
GRAY = "#808080"
COLORS = {
    "teacher": "#4b5563",
    "corrected_teacher": "#6d45c4",
    "original": "#8a5a44",
    "pruned": "#9a6700",
    "distilled": "#0e7490",
    "student": "#0a7c59",
    "student_fp8": "#c2410c",
    "student_fp8_tensor": "#b45309",
    "student_nvfp4": "#4d7c0f",
    "student_int8": "#0369a1",
    "student_int4": "#7c3aed",
    "ce": "#2b62d9",
    "scratch": "#b3246b",
}
# Colors of items without their own color, in order. Markers differ too, for color-blind readers.
SERIES = tuple(COLORS[name] for name in ("ce", "student", "pruned", "scratch", "corrected_teacher", "teacher"))
MARKERS = "ohD^vsd<>PX*p"
# Inches. On a phone, text keeps its size if a plot is not much wider than the screen.
SIZE = (4.8, 3.1)


class Plot:
    """A figure with panels in a row, in gray, with two spines and a faint grid.

    Attributes:
        axes: matplotlib's axes, one per panel.
        hover: tooltips of the points of an artist, by its id in the SVG file.
    """

    def __init__(self, panels: int = 1, size: tuple[float, float] = SIZE) -> None:
        from matplotlib.figure import Figure  # half a second; only needed for plots

        self.figure = Figure(figsize=size, layout="constrained")
        self.axes = self.figure.subplots(1, panels, squeeze=False)[0]
        self.hover: dict[str, list[str]] = {}
        for axes in self.axes:
            axes.tick_params(colors=GRAY)
            for side, spine in axes.spines.items():
                spine.set_visible(side in ("left", "bottom"))
                spine.set_color(GRAY)
            axes.grid(color=GRAY, alpha=0.2)

    def label(self, x: str, y: str, title: str | None = None, panel: int = 0) -> None:
        """Set the labels of a panel's axes."""
        self.axes[panel].set_xlabel(x, color=GRAY)
        self.axes[panel].set_ylabel(y, color=GRAY)
        if title is not None:
            self.axes[panel].set_title(title, color=GRAY, fontsize="medium")

    def legend(self, columns: int = 2) -> None:
        self.figure.legend(loc="outside upper center", ncols=columns, frameon=False, labelcolor=GRAY, fontsize="small")

    def set_tooltips(self, artist: Any, texts: Sequence[str]) -> None:
        """Set the tooltips of an artist's points."""
        gid = f"points-{len(self.hover)}"
        artist.set_gid(gid)
        self.hover[gid] = list(texts)

    def write(self, target: Any) -> None:
        """Write SVG to a path or a file object, without a date, and with text as text."""
        import matplotlib  # half a second; only needed for plots

        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "plots"}):
            self.figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})

    def save(self, path: Path) -> None:
        """Write a file atomically."""
        with replace_file(path) as temporary:
            self.write(temporary)


def importance(table: Json) -> Plot:
    """Plot importance scores, one panel per axis: layers, heads, FFN channels, hidden channels."""
    plot = Plot(4, (12.8, 3.2))
    for panel, draw in enumerate((layer_importance, head_importance, ffn_importance, hidden_importance)):
        draw(plot, table, panel)
    return plot


def layer_importance(plot: Plot, table: Json, panel: int = 0) -> None:
    rows = table["layers"]
    numbers, scores = [row["layer"] for row in rows], [row["score"] for row in rows]
    plot.axes[panel].bar(numbers, scores, color=COLORS["ce"])
    # Points for the tooltips: bars have none.
    points = plot.axes[panel].scatter(numbers, scores, color=COLORS["ce"], s=14)
    plot.set_tooltips(points, [f"layer {row['layer']}: {row['score']:.4g}" for row in rows])
    _importance_axes(plot, panel, "layers", "layer")


def head_importance(plot: Plot, table: Json, panel: int = 0) -> None:
    spots = [(row["layer"], score) for row in table["layers"] for score in row["heads"]]
    points = plot.axes[panel].scatter(*zip(*spots, strict=True), color=COLORS["student"], s=14)
    plot.set_tooltips(points, [f"layer {layer}: {score:.4g}" for layer, score in spots])
    _importance_axes(plot, panel, "attention heads", "layer")


def ffn_importance(plot: Plot, table: Json, panel: int = 0) -> None:
    numbers = [row["layer"] for row in table["layers"]]
    quantiles = list(zip(*(row["ffn_quantiles"] for row in table["layers"]), strict=True))
    axes, color = plot.axes[panel], COLORS["pruned"]
    axes.fill_between(numbers, quantiles[0], quantiles[-1], color=color, alpha=0.25, linewidth=0)
    axes.fill_between(numbers, quantiles[1], quantiles[-2], color=color, alpha=0.35, linewidth=0)
    axes.plot(numbers, quantiles[2], color=color)
    _importance_axes(plot, panel, "FFN channels: median, 50 %, 90 %", "layer")


def hidden_importance(plot: Plot, table: Json, panel: int = 0) -> None:
    plot.axes[panel].plot(sorted(table["hidden_size"], reverse=True), color=COLORS["scratch"])
    _importance_axes(plot, panel, "hidden channels, sorted", "rank")


def _importance_axes(plot: Plot, panel: int, title: str, x: str) -> None:
    plot.label(x, "importance" if panel == 0 else "", title, panel)
    plot.axes[panel].set_ylim(bottom=0)
    if x == "layer":
        plot.axes[panel].xaxis.get_major_locator().set_params(integer=True)


def pareto(candidates: list[Json], teacher: Json, cost: str = "params", label: str = "teacher") -> Plot:
    """Plot loss over cost of every scored candidate: just pruned, and after each round.

    Args:
        candidates: rows of a candidate table: `params`, `num_layers`, `loss`, and `rounds` if distilled.
        teacher: `params` and `loss` of the model that is pruned; `label`: its name.
        cost: column of the cost: `params` or `latency_ms`.
    """
    plot = Plot()
    (axes,) = plot.axes
    scale, x_label = (1e6, "million parameters") if cost == "params" else (1, "milliseconds per forward pass")
    depths = sorted({row["num_layers"] for row in candidates})
    for index, depth in enumerate(depths):
        rows = [row for row in candidates if row["num_layers"] == depth]
        mark = {"marker": MARKERS[index % len(MARKERS)], "s": 26}
        color = SERIES[index % len(SERIES)]
        costs = [row[cost] / scale for row in rows]
        points = axes.scatter(
            costs, [row["loss"] for row in rows], label=f"{depth} layers, pruned", color=color, **mark
        )
        plot.set_tooltips(
            points, [_candidate(row, x, x_label, row["loss"]) for row, x in zip(rows, costs, strict=True)]
        )
        ended = [(row, row[cost] / scale, entry["val_loss"]) for row in rows for entry in row.get("rounds", [])]
        if ended:
            spots = [(x, y) for _, x, y in ended]
            hollow = {**mark, "color": "none", "edgecolors": color, "label": f"{depth} layers, after a round"}
            points = axes.scatter(*zip(*spots, strict=True), **hollow)
            plot.set_tooltips(points, [_candidate(row, x, x_label, y) for row, x, y in ended])
    front = pareto_front([(row[cost] / scale, row["loss"]) for row in candidates])
    axes.plot(*zip(*front, strict=True), color=GRAY, linewidth=1, label="Pareto front")
    axes.axhline(teacher["loss"], color=COLORS[label], linestyle="--", label=label)
    plot.label(x_label, "held-out loss (nats per token)")
    plot.legend()
    return plot


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto-optimal points (low x, low y), from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _candidate(row: Json, x: float, x_label: str, loss: float) -> str:
    name = ", ".join(filter(None, (shape_words(row), describe_dropped_layers(row))))
    return f"{name}: {x:.4g} {x_label}, loss {loss:.4f}"


def shape_words(row: Json) -> str:
    """Format a candidate's sizes."""
    widths = {"hidden_size": "hidden", "ffn_hidden_size": "FFN", "num_attention_heads": "heads"}
    sizes = [f"{word} {row[key]}" for key, word in widths.items() if key in row]
    return ", ".join([f"{row['num_layers']} layers", *sizes])


def describe_dropped_layers(row: Json) -> str:
    """Format the layers of the teacher that a candidate drops; empty if it has all."""
    dropped = row.get("drop_layers")
    return f"without layer{'s'[: len(dropped) - 1]} {ranges(dropped)}" if dropped else ""
