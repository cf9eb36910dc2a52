"""How all plots look, and those that pruning and the report have in common. matplotlib is imported only where one is
drawn. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prune_distill.atomic_files import replace_file
from prune_distill.config.wording import ranges
from prune_distill.reporting import Json

# Reads on white and on black, so that a file needs a single picture; a page has colors of its own for it.
GREY = "#808080"
COLOURS = {
    "teacher": "#4b5563",
    "corrected_teacher": "#6d45c4",
    "pruned": "#9a6700",
    "student": "#0a7c59",
    "ce": "#2b62d9",
    "scratch": "#b3246b",
}
# Of things that have no color by name, in this order. Markers differ as well, for those who see colors alike.
SERIES = tuple(COLOURS[name] for name in ("ce", "student", "pruned", "scratch", "corrected_teacher", "teacher"))
MARKERS = "osD^v<>P*X"
# Inches. Text keeps its size on a telephone if a plot is not drawn much wider than its screen.
SIZE = (4.8, 3.1)


class Plot:
    """A figure of some panels in a row: grey, two sides, a faint grid.

    Attributes:
        axes: matplotlib's, one a panel.
        hover: by an artist's id in the SVG file, the text that each of its points shows under the pointer.
    """

    def __init__(self, panels: int = 1, size: tuple[float, float] = SIZE) -> None:
        from matplotlib.figure import Figure  # takes half a second; only for plots

        self.figure = Figure(figsize=size, layout="constrained")
        self.axes = self.figure.subplots(1, panels, squeeze=False)[0]
        self.hover: dict[str, list[str]] = {}
        for axes in self.axes:
            axes.tick_params(colors=GREY)
            for side, spine in axes.spines.items():
                spine.set_visible(side in ("left", "bottom"))
                spine.set_color(GREY)
            axes.grid(color=GREY, alpha=0.2)

    def label(self, x: str, y: str, title: str | None = None, panel: int = 0) -> None:
        """What the axes of a panel show."""
        self.axes[panel].set_xlabel(x, color=GREY)
        self.axes[panel].set_ylabel(y, color=GREY)
        if title is not None:
            self.axes[panel].set_title(title, color=GREY, fontsize="medium")

    def legend(self, columns: int = 2) -> None:
        self.figure.legend(loc="outside upper center", ncols=columns, frameon=False, labelcolor=GREY, fontsize="small")

    def tell(self, artist: Any, texts: Sequence[str]) -> None:
        """Has each point of an artist show a text under the pointer."""
        gid = f"points-{len(self.hover)}"
        artist.set_gid(gid)
        self.hover[gid] = list(texts)

    def write(self, target: Any) -> None:
        """Writes SVG to a path or a file object, without the date; text stays text."""
        import matplotlib  # takes half a second; only for plots

        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "plots"}):
            self.figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})

    def save(self, path: Path) -> None:
        """Writes a file so that a reader sees the old one or the new."""
        with replace_file(path) as temporary:
            self.write(temporary)


def importance(table: Json) -> Plot:
    """A panel an axis: layers, heads, FFN channels, hidden channels."""
    plot = Plot(4, (12.8, 3.2))
    for panel, draw in enumerate((layer_importance, head_importance, ffn_importance, hidden_importance)):
        draw(plot, table, panel)
    return plot


def layer_importance(plot: Plot, table: Json, panel: int = 0) -> None:
    rows = table["layers"]
    numbers, scores = [row["layer"] for row in rows], [row["score"] for row in rows]
    plot.axes[panel].bar(numbers, scores, color=COLOURS["ce"])
    # What the pointer finds: bars are no points.
    points = plot.axes[panel].scatter(numbers, scores, color=COLOURS["ce"], s=14)
    plot.tell(points, [f"layer {row['layer']}: {row['score']:.4g}" for row in rows])
    _importance_axes(plot, panel, "layers", "layer")


def head_importance(plot: Plot, table: Json, panel: int = 0) -> None:
    spots = [(row["layer"], score) for row in table["layers"] for score in row["heads"]]
    points = plot.axes[panel].scatter(*zip(*spots, strict=True), color=COLOURS["student"], s=14)
    plot.tell(points, [f"layer {layer}: {score:.4g}" for layer, score in spots])
    _importance_axes(plot, panel, "attention heads", "layer")


def ffn_importance(plot: Plot, table: Json, panel: int = 0) -> None:
    numbers = [row["layer"] for row in table["layers"]]
    quantiles = list(zip(*(row["ffn_quantiles"] for row in table["layers"]), strict=True))
    axes, color = plot.axes[panel], COLOURS["pruned"]
    axes.fill_between(numbers, quantiles[0], quantiles[-1], color=color, alpha=0.25, linewidth=0)
    axes.fill_between(numbers, quantiles[1], quantiles[-2], color=color, alpha=0.35, linewidth=0)
    axes.plot(numbers, quantiles[2], color=color)
    _importance_axes(plot, panel, "FFN channels: median, 50 %, 90 %", "layer")


def hidden_importance(plot: Plot, table: Json, panel: int = 0) -> None:
    plot.axes[panel].plot(sorted(table["hidden_size"], reverse=True), color=COLOURS["scratch"])
    _importance_axes(plot, panel, "hidden channels, sorted", "rank")


def _importance_axes(plot: Plot, panel: int, title: str, x: str) -> None:
    plot.label(x, "importance" if panel == 0 else "", title, panel)
    plot.axes[panel].set_ylim(bottom=0)
    if x == "layer":
        plot.axes[panel].xaxis.get_major_locator().set_params(integer=True)


def pareto(candidates: list[Json], teacher: Json, cost: str = "params") -> Plot:
    """Loss over cost of every candidate that was scored: just pruned, and after each round that it took part in.

    Args:
        candidates: rows of a candidate table: `params`, `num_layers`, `loss`, and `rounds` where distilled.
        teacher: `params` and `loss`.
        cost: the column that is the cost: `params` or `latency_ms`.
    """
    plot = Plot()
    (axes,) = plot.axes
    scale, x_label = (1e6, "million parameters") if cost == "params" else (1, "milliseconds a forward pass")
    depths = sorted({row["num_layers"] for row in candidates})
    for index, depth in enumerate(depths):
        rows = [row for row in candidates if row["num_layers"] == depth]
        mark = {"marker": MARKERS[index % len(MARKERS)], "s": 26}
        color = SERIES[index % len(SERIES)]
        costs = [row[cost] / scale for row in rows]
        points = axes.scatter(
            costs, [row["loss"] for row in rows], label=f"{depth} layers, pruned", color=color, **mark
        )
        plot.tell(points, [_candidate(row, x, x_label, row["loss"]) for row, x in zip(rows, costs, strict=True)])
        ended = [(row, row[cost] / scale, entry["val_loss"]) for row in rows for entry in row.get("rounds", [])]
        if ended:
            spots = [(x, y) for _, x, y in ended]
            hollow = {**mark, "color": "none", "edgecolors": color, "label": f"{depth} layers, after a round"}
            points = axes.scatter(*zip(*spots, strict=True), **hollow)
            plot.tell(points, [_candidate(row, x, x_label, y) for row, x, y in ended])
    front = pareto_front([(row[cost] / scale, row["loss"]) for row in candidates])
    axes.plot(*zip(*front, strict=True), color=GREY, linewidth=1, label="Pareto front")
    axes.axhline(teacher["loss"], color=COLOURS["teacher"], linestyle="--", label="teacher")
    plot.label(x_label, "held-out loss (nats per token)")
    plot.legend()
    return plot


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is below or left of, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _candidate(row: Json, x: float, x_label: str, loss: float) -> str:
    name = ", ".join(filter(None, (shape_words(row), describe_dropped_layers(row))))
    return f"{name}: {x:.4g} {x_label}, loss {loss:.4f}"


def shape_words(row: Json) -> str:
    """A candidate's sizes, in a line."""
    widths = {"hidden_size": "hidden", "ffn_hidden_size": "FFN", "num_attention_heads": "heads"}
    sizes = [f"{word} {row[key]}" for key, word in widths.items() if key in row]
    return ", ".join([f"{row['num_layers']} layers", *sizes])


def describe_dropped_layers(row: Json) -> str:
    """The teacher's layers that a candidate lacks; nothing where it has all."""
    lost = row.get("drop_layers")
    return f"without layer{'s'[: len(lost) - 1]} {ranges(lost)}" if lost else ""
