"""Plots of training and measurements for the report. Functions return None if there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prune_distill.benchmarking.timing import LoadFigures
from prune_distill.evaluation.results import RecoveryPoint, TaskScores
from prune_distill.pipeline.names import LOG
from prune_distill.reporting import Json
from prune_distill.reporting.cells import median
from prune_distill.reporting.plots import COLORS, GRAY, MARKERS, SERIES, Plot, pareto_front
from prune_distill.reporting.results import LABELS, REFERENCES, ModelReport, headline
from prune_distill.reporting.run_folder import StageFolder
from prune_distill.reporting.words import duration, finite

LOSS = "held-out loss (nats per token)"
# Models whose losses are horizontal lines in plots of a training.
LEVELS = ("teacher", "corrected_teacher", "original", "pruned")
# Maximum number of points of a line.
MOST_POINTS = 400

Lines = Sequence[Mapping[str, float | None]]
Points = list[tuple[float, float]]


def pick_color(name: str, index: int = 0) -> str:
    return COLORS.get(name, SERIES[index % len(SERIES)])


def pick_marker(name: str, index: int) -> str:
    """Return the marker of a model, which is the same in all plots, or else one by `index`."""
    return MARKERS[(list(COLORS).index(name) if name in COLORS else index) % len(MARKERS)]


def format_label(name: str) -> str:
    return LABELS.get(name, name)


def extract_points(lines: Lines, y: str, x: str = "step") -> Points:
    """Extract the finite points from the lines of a metrics file."""
    pairs = [(finite(line.get(x)), finite(line.get(y))) for line in lines]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def thin_points(points: Points) -> Points:
    """Select at most `MOST_POINTS` evenly spaced points, including the last one."""
    stride = -(-len(points) // MOST_POINTS)
    return points if stride < 2 else [*points[:-1:stride], points[-1]]


def validation(models: Mapping[str, ModelReport], curves: Mapping[str, Lines], same_tokens: bool = True) -> Plot | None:
    """Plot the held-out loss of every student during training, with those of the pruned model and the teacher.

    Args:
        same_tokens: whether training and evaluation measure on the same tokens; otherwise the curves stand alone.
    """
    evaluated = models if same_tokens else {}
    pruned = finite(evaluated.get("pruned", {}).get("val_loss"))
    levels = {name: evaluated.get(name, {}).get("val_loss") for name in LEVELS}
    found = {}
    for name, lines in curves.items():
        if points := extract_points(lines, "val_loss"):
            found[name] = [(0.0, pruned), *points] if pruned is not None and name != "scratch" else points
    return _curves(found, "step", levels=levels)


def validations(curves: Mapping[str, Lines]) -> Plot | None:
    """Plot the validation losses of the students of several runs."""
    found = {name: extract_points(lines, "val_loss") for name, lines in curves.items()}
    return _curves({name: points for name, points in found.items() if points}, "step")


def training(lines: Lines, name: str) -> Plot | None:
    """Plot the training loss of one student. Those of several students may not be comparable."""
    points = thin_points(extract_points(lines, "loss"))
    if not points:
        return None
    plot = Plot()
    plot.axes[0].plot(*zip(*points, strict=True), color=pick_color(name), linewidth=1.2)
    unseen = plot.axes[0].scatter(*zip(*points, strict=True), color=pick_color(name), s=16, alpha=0.01)
    plot.set_tooltips(unseen, [f"step {x:g}: {y:.4f}" for x, y in points])
    plot.label("step", "training loss (nats per token)")
    return plot


def recovery_loss(rows: Sequence[RecoveryPoint], models: Mapping[str, ModelReport]) -> Plot | None:
    """Plot the held-out loss of the saved checkpoints over tokens."""
    found = _by_model(rows, lambda row: finite(row.get("val_loss")))
    return _curves(found, "million tokens", levels={name: models.get(name, {}).get("val_loss") for name in REFERENCES})


def recovery_task(rows: Sequence[RecoveryPoint], task: str, models: Mapping[str, ModelReport]) -> Plot | None:
    """Plot a task's score of the saved checkpoints over tokens."""

    def score(row: RecoveryPoint | ModelReport) -> float | None:
        tasks = row.get("tasks")
        found = headline(tasks[task]) if isinstance(tasks, dict) and isinstance(tasks.get(task), dict) else None
        return found[1] if found is not None else None

    levels = {name: score(models.get(name, {})) for name in REFERENCES}
    return _curves(_by_model(rows, score), "million tokens", "score", task, levels)


def _curves(
    found: Mapping[str, Points],
    x_label: str,
    y_label: str = LOSS,
    title: str | None = None,
    levels: Mapping[str, float | None] | None = None,
) -> Plot | None:
    """Plot a line per name, with horizontal lines at the known levels."""
    if not found:
        return None
    plot = Plot()
    for name, value in (levels or {}).items():
        level = finite(value)
        if level is not None:
            style = ":" if name == "pruned" else "--"
            plot.axes[0].axhline(level, color=COLORS[name], linestyle=style, label=format_label(name))
    for index, (name, points) in enumerate(found.items()):
        xs, ys = zip(*points, strict=True)
        color = pick_color(name, index)
        plot.axes[0].plot(xs, ys, color=color, linewidth=1.5)
        marks = {"marker": pick_marker(name, index), "s": 26, "label": format_label(name)}
        shown = plot.axes[0].scatter(xs, ys, color=color, **marks)
        plot.set_tooltips(shown, [f"{format_label(name)}, {x:.4g} {x_label}: {y:.4f}" for x, y in points])
    plot.label(x_label, y_label, title)
    plot.legend()
    return plot


def _by_model(rows: Sequence[RecoveryPoint], value: Callable[[RecoveryPoint], float | None]) -> dict[str, Points]:
    found: dict[str, Points] = {}
    for row in rows:
        tokens, y = finite(row.get("tokens")), value(row)
        if tokens is not None and y is not None:
            found.setdefault(str(row.get("model", "student")), []).append((tokens / 1e6, y))
    return found


def scores(tasks: Mapping[str, Mapping[str, TaskScores]]) -> Plot | None:
    """Plot every model's score on every task, with its standard error."""
    rows = [
        (task, name, headline(scores)) for task, task_scores in tasks.items() for name, scores in task_scores.items()
    ]
    found = [(task, name, score) for task, name, score in rows if score is not None]
    if not found:
        return None
    shown_tasks, names = list(dict.fromkeys(row[0] for row in found)), list(dict.fromkeys(row[1] for row in found))
    plot = Plot(size=(4.8, max(2.2, 0.9 + len(shown_tasks) * (0.22 + 0.14 * len(names)))))
    for index, name in enumerate(names):
        shift = 0.16 * (index - (len(names) - 1) / 2)
        model_scores = [(score[1], shown_tasks.index(task) + shift, score[2]) for task, n, score in found if n == name]
        xs, ys, errors = zip(*model_scores, strict=True)
        color = pick_color(name, index)
        bars = {"fmt": "none", "ecolor": color, "elinewidth": 1.2, "capsize": 2}
        plot.axes[0].errorbar(xs, ys, xerr=[error or 0 for error in errors], **bars)
        marks = {"marker": pick_marker(name, index), "s": 26, "label": format_label(name)}
        points = plot.axes[0].scatter(xs, ys, color=color, **marks)
        plot.set_tooltips(
            points, [f"{format_label(name)}: {x:.4f}" + (f" ± {e:.4f}" if e else "") for x, _, e in model_scores]
        )
    plot.axes[0].set_yticks(range(len(shown_tasks)), shown_tasks)
    plot.axes[0].invert_yaxis()
    plot.label("score, with one standard error", "")
    plot.legend(3)
    return plot


def trade(
    models: Mapping[str, ModelReport], costs: Mapping[str, float | None], x_label: str, front: int = 0
) -> Plot | None:
    """Plot held-out loss over a cost or a speed, one point per model.

    Args:
        front: 1 draws the Pareto front of loss and cost, -1 that of loss and speed, 0 none.
    """
    rows = [(name, costs.get(name), finite(model.get("val_loss"))) for name, model in models.items()]
    found = [(name, x, y) for name, x, y in rows if x is not None and y is not None]
    if len(found) < 2:
        return None
    plot = Plot()
    for index, (name, x, y) in enumerate(found):
        marks = {"marker": pick_marker(name, index), "s": 44, "label": format_label(name)}
        point = plot.axes[0].scatter([x], [y], color=pick_color(name, index), **marks)
        plot.set_tooltips(point, [f"{format_label(name)}: {x:.4g} {x_label}, loss {y:.4f}"])
    if front:
        best = pareto_front([(front * x, y) for _, x, y in found])
        plot.axes[0].plot([front * x for x, _ in best], [y for _, y in best], color=GRAY, linewidth=1)
    plot.axes[0].margins(0.15)
    plot.label(x_label, LOSS)
    plot.legend()
    return plot


def size_trade(models: Mapping[str, ModelReport], front: int = 0) -> Plot | None:
    """Plot held-out loss over parameters; see `trade`."""
    sizes = {name: finite(model.get("params")) for name, model in models.items()}
    millions = {name: size / 1e6 if size else None for name, size in sizes.items()}
    return trade(models, millions, "million parameters", front)


def load(models: Mapping[str, Mapping[str, LoadFigures]]) -> Plot | None:
    """Plot the time to the first token over the speed of generation; with at least two rates of requests."""
    found: dict[str, Points] = {}
    for name, rates in models.items():
        pairs = [
            (median(entry.get("output_tokens_per_second")), median(entry.get("time_to_first_token_seconds")))
            for entry in rates.values()
        ]
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        if len(points) > 1:
            found[name] = points
    return _curves(found, "tokens/s of all requests", "time to the first token (s)")


def timeline(stages: Mapping[str, StageFolder]) -> Plot | None:
    """Plot when each stage ran; earlier starts, which were interrupted, are hollow marks."""
    spans = {name: _span(stage) for name, stage in stages.items()}
    found = {name: span for name, span in spans.items() if span is not None}
    if not found:
        return None
    zero = min(stages[name].attempts[0].started if stages[name].attempts else span[0] for name, span in found.items())
    last = max(span[1] for span in found.values())
    unit, word = next(
        (size, word)
        for size, word in ((86400, "days"), (3600, "hours"), (60, "minutes"), (0, "seconds"))
        if last - zero > 3 * size
    )
    unit = unit or 1
    plot = Plot(size=(4.8, 0.9 + 0.24 * len(found)))
    axes = plot.axes[0]
    for row, (name, (start, end)) in enumerate(found.items()):
        color = COLORS["student"] if stages[name].complete else COLORS["scratch"]
        axes.barh(
            row, max(end - start, (last - zero) / 200) / unit, left=(start - zero) / unit, height=0.6, color=color
        )
        middle = axes.scatter([((start + end) / 2 - zero) / unit], [row], color=color, s=30)
        plot.set_tooltips(middle, [f"{name}, {stages[name].state}: {duration(end - start)}"])
        interrupted = [attempt.started for attempt in stages[name].attempts if attempt.started < start - 1]
        if interrupted:
            marks = axes.scatter(
                [(at - zero) / unit for at in interrupted],
                [row] * len(interrupted),
                color="none",
                edgecolors=GRAY,
                s=26,
            )
            plot.set_tooltips(marks, [f"{name}: started, then interrupted or paused"] * len(interrupted))
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    plot.label(f"{word} since the first start", "")
    return plot


def _span(stage: StageFolder) -> tuple[float, float] | None:
    """Return start and end of a stage's last process; None if unknown."""
    start, end = stage.manifest.started, stage.manifest.ended
    if start is not None and end is not None:
        return start, end
    if not stage.attempts:
        return None
    try:
        end = (stage.folder / LOG).stat().st_mtime
    except OSError:
        end = stage.attempts[-1].started
    return stage.attempts[-1].started, max(end, stage.attempts[-1].started)


def candidates(rows: Any, cost: str) -> list[Json]:
    """Select the rows of a candidate table that can be drawn over a cost."""
    numbers = ("num_layers", "loss", cost)
    listed = rows if isinstance(rows, list) else []
    usable = [row for row in listed if isinstance(row, dict) and None not in [finite(row.get(key)) for key in numbers]]
    return [{**row, "rounds": _ended(row.get("rounds"))} for row in usable]


def _ended(rounds: Any) -> list[Json]:
    """Select the rounds of a candidate that have a loss."""
    entries = rounds if isinstance(rounds, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and finite(entry.get("val_loss")) is not None]
