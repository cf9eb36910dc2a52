"""The page that compares several runs, each student with its own teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prune_distill.reporting import figures, words
from prune_distill.reporting.blocks import Block, Cell, Column, Note, Page, Section, Table
from prune_distill.reporting.cells import (
    Clean,
    agreement,
    benchmarked,
    compute_ratios,
    draw,
    mean_score,
    median,
    number_cell,
)
from prune_distill.reporting.results import REFERENCES, ModelReport, Report
from prune_distill.reporting.run_folder import RunFolder
from prune_distill.reporting.words import finite

# Keys of the config that are not settings.
NO_SETTINGS = {"run_dir"}


def name_runs(runs: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """Return runs by unique names: that of the experiment, with that of the folder if necessary."""
    names = Counter(run.name for run in runs)
    made: dict[str, RunFolder] = {}
    for number, run in enumerate(runs, 1):
        name = run.name if names[run.name] == 1 else f"{run.name}: {run.path.resolve().name}"
        made[name if name not in made else f"{name} ({number})"] = run
    return made


def page(runs: Mapping[str, RunFolder], reports: Mapping[str, Report], clean: Clean) -> Page:
    """Build the comparison of runs; names as in `name_runs`."""
    students = {name: report["models"]["student"] for name, report in reports.items() if "student" in report["models"]}
    missing = [f"{name} has no evaluated student ({reports[name]['state']})" for name in runs if name not in students]
    sections = [
        Section("students", "Students against their teachers", [_table(reports)]),
        Section("curves", "Curves and trade-offs", _plots(runs, reports, students, clean)),
        Section("settings", "Settings that differ", [_settings(runs)]),
    ]
    return Page(
        title=f"Comparison of {len(runs)} runs",
        heading=f"{len(runs)} runs compared",
        meta=" · ".join(runs),
        state="",
        lead=_lead(students, reports),
        blocks=[Note("; ".join(missing) + ".", "warning")] if missing else [],
        sections=sections,
    )


def _lead(students: Mapping[str, ModelReport], reports: Mapping[str, Report]) -> str:
    losses = {name: finite(student.get("val_loss")) for name, student in students.items()}
    found = {name: loss for name, loss in losses.items() if loss is not None}
    if not found:
        return "None of these runs has an evaluated student yet."
    best = min(found, key=lambda name: found[name])
    loss = words.number(found[best], 3)
    return f"Of {len(found)} students, that of {best} has the lowest held-out loss: {loss} nats per token."


def _table(reports: Mapping[str, Report]) -> Table:
    # What the students are pruned from, which is the teacher too unless a run has another one.
    base = REFERENCES[min(report["reference"] for report in reports.values())]
    columns = [
        Column("Run", text=True),
        Column("Parameters", "student"),
        Column("Held-out loss", "student"),
        Column("Held-out loss", "teacher"),
        Column("Difference"),
        Column("Same next token", "as the teacher"),
        Column("Tasks", "mean score"),
        Column("Generation", f"times {base}'s"),
        Column("Memory", f"times {base}'s"),
        Column("State", text=True),
    ]
    rows = []
    for name, report in reports.items():
        student, teacher = (report["models"].get(model, {}) for model in ("student", "teacher"))
        loss, teacher_loss = finite(student.get("val_loss")), finite(teacher.get("val_loss"))
        difference = loss - teacher_loss if loss is not None and teacher_loss is not None else None
        ratios = compute_ratios(report, "student")
        smaller = words.change(student.get("params"), report["models"].get(report["reference"], {}).get("params"))
        rows.append(
            [
                Cell(name),
                number_cell(student.get("params"), words.count, smaller),
                number_cell(loss, lambda value: words.number(value, 4)),
                number_cell(teacher_loss, lambda value: words.number(value, 4)),
                number_cell(difference, lambda value: words.signed(value, 4)),
                number_cell(agreement(student, "top1"), lambda value: words.percent(value, 1)),
                number_cell(mean_score(report["tasks"], "student"), lambda value: words.number(value, 3)),
                number_cell(median(ratios.get("decode")), words.times),
                number_cell(ratios.get("memory"), words.times),
                Cell(report["state"]),
            ]
        )
    # Omit columns without measurements.
    kept = [number for number in range(len(columns)) if any(row[number].text != words.NOTHING for row in rows)]
    shown = [[row[index] for index in kept] for row in rows]
    return Table("Every run's student against its teacher", [columns[index] for index in kept], shown)


def _plots(
    runs: Mapping[str, RunFolder], reports: Mapping[str, Report], students: Mapping[str, ModelReport], clean: Clean
) -> list[Block]:
    curves = {name: run.stages["distill"].lines() for name, run in runs.items() if "distill" in run.stages}
    speeds = {
        name: median(benchmarked(report).get("student", {}).get("decode_tokens_per_second"))
        for name, report in reports.items()
    }
    plots = (
        (figures.validations(curves), "Held-out loss of every run's student during training."),
        (
            figures.size_trade(students, 1),
            "Quality against size; the line is the Pareto front.",
        ),
        (
            figures.trade(students, speeds, "tokens/s of generation", -1),
            "Quality against speed; the line is the Pareto front.",
        ),
    )
    return [*draw(plots, clean)] or [Note("There are no plots yet.", "missing")]


def _settings(runs: Mapping[str, RunFolder]) -> Block:
    flat = {name: dict(_flatten(run.tree)) for name, run in runs.items()}
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings if key not in NO_SETTINGS))
    differing = [key for key in keys if len({repr(settings.get(key)) for settings in flat.values()}) > 1]
    if not differing:
        return Note("All settings are the same.")
    columns = [Column("Setting", text=True), *(Column(name, text=True) for name in runs)]
    rows = [[Cell(key), *(Cell(_format_setting(settings, key)) for settings in flat.values())] for key in differing]
    return Table("Config values that differ between runs", columns, rows)


def _format_setting(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return words.NOTHING
    value = settings[key]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [leaf for key, value in tree.items() for leaf in _flatten(value, f"{prefix}.{key}" if prefix else str(key))]
