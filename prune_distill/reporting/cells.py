"""Cells of tables, and the values in them. A missing or malformed value becomes a dash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prune_distill.benchmarking.timing import LoadFigures, ModelFigures, Ratios
from prune_distill.evaluation.results import HeldOut, TaskScores
from prune_distill.reporting import words
from prune_distill.reporting.blocks import Cell, Figure, Figures, Note
from prune_distill.reporting.plots import Plot
from prune_distill.reporting.results import Report, headline
from prune_distill.reporting.run_folder import RunFolder
from prune_distill.reporting.svg import inline
from prune_distill.reporting.words import finite

Clean = Callable[[str], str]


def number_cell(value: Any, shown: Callable[[Any], str], detail: str = "") -> Cell:
    found = finite(value)
    return Cell(words.NOTHING) if found is None else Cell(shown(value), found, detail)


def score_cell(scores: TaskScores | None, teacher_scores: TaskScores | None) -> Cell:
    found = headline(scores) if isinstance(scores, dict) else None
    if found is None:
        return Cell(words.NOTHING)
    _, value, error = found
    base = headline(teacher_scores) if isinstance(teacher_scores, dict) else None
    difference = words.difference(value, base[1]) if base is not None else ""
    return Cell(
        words.number(value, 3) + (f" ± {words.number(error, 3)}" if error is not None else ""), value, difference
    )


def spread_cell(spread: Any, ratio: Any, shown: Callable[[Any], str]) -> Cell:
    against = f"{words.times(median(ratio))} ({spread_words(ratio)})" if median(ratio) is not None else ""
    return number_cell(median(spread), shown, against)


def spread_words(spread: Any) -> str:
    """Format the range of a measurement over its rounds."""
    if not isinstance(spread, dict):
        return ""
    return f"{words.times(spread.get('min'))} to {words.times(spread.get('max'))}"


def median(spread: Any) -> float | None:
    return finite(spread.get("median")) if isinstance(spread, dict) else finite(spread)


def mean_score(tasks: Mapping[str, Mapping[str, TaskScores]], name: str) -> float | None:
    found = [headline(task_scores[name]) if name in task_scores else None for task_scores in tasks.values()]
    values = [score[1] for score in found if score is not None]
    return sum(values) / len(values) if values and len(values) == len(found) else None


def agreement(model: HeldOut, key: str) -> float | None:
    agreement = model.get("agreement")
    return finite(agreement.get(key)) if isinstance(agreement, dict) else None


def benchmarked(report: Report) -> dict[str, ModelFigures]:
    models = (report["benchmark"] or {}).get("models")
    if not isinstance(models, dict):
        return {}
    return {name: model for name, model in models.items() if isinstance(model, dict)}


def compute_ratios(report: Report, name: str) -> Ratios:
    ratios = (report["benchmark"] or {}).get("ratios")
    found = ratios.get(name) if isinstance(ratios, dict) else None
    return found if isinstance(found, dict) else {}


def benchmark_settings(report: Report) -> list[str]:
    """Return what the benchmark measured with, and on what."""
    benchmark = report["benchmark"] or {}
    return [
        f"{benchmark.get('engine', '?')} {benchmark.get('engine_version', '')}".strip()
        + f" on {benchmark.get('device', '?')}",
        f"{benchmark.get('dtype', '?')}",
        f"batch {benchmark.get('batch_size', '?')}, {benchmark.get('prompt_tokens', '?')} prompt tokens,"
        f" {benchmark.get('new_tokens', '?')} new tokens",
    ]


def load_by_rate(figures: ModelFigures | Ratios) -> dict[str, LoadFigures]:
    """Return the figures of a server by the rate of requests."""
    load = figures.get("load")
    listed = [entry for entry in load if isinstance(entry, dict)] if isinstance(load, list) else []
    rates = [finite(entry.get("request_rate")) for entry in listed]
    return {"all at once" if rate is None else f"{rate:g}": entry for rate, entry in zip(rates, listed, strict=True)}


def draw(plots: Iterable[tuple[Plot | None, str]], clean: Clean) -> list[Figures]:
    """Draw plots with their captions, next to each other; nothing if all are None."""
    drawn = [Figure(inline(plot, caption, clean), caption) for plot, caption in plots if plot is not None]
    return [Figures(drawn)] if drawn else []


def missing(run: RunFolder, stage: str, words_: str) -> Note:
    """Return a note that a result is missing, with the state of the stage that makes it."""
    found = run.stages.get(stage)
    if found is None:
        return Note(f"{words_}: this run has no stage {stage}.", "missing")
    if found.complete:
        return Note(f"{words_}, though stage {stage} is complete.", "missing")
    why = f" ({found.cause.splitlines()[-1]})" if found.state == "failed" and found.cause else ""
    return Note(f"{words_}: stage {stage} {'is ' if found.state != 'failed' else ''}{found.state}{why}.", "missing")
