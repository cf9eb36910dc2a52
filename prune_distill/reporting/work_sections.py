"""Sections on the work: training, pruning, the stages, and the commands to repeat them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from prune_distill.pipeline.names import CANDIDATES, CHOICE, IMPORTANCE
from prune_distill.reporting import Json, figures, plots, words
from prune_distill.reporting.blocks import Block, Cell, Code, Column, Note, Table
from prune_distill.reporting.cells import Clean, draw, missing, number_cell
from prune_distill.reporting.figures import format_label
from prune_distill.reporting.planned import compare_with_actual
from prune_distill.reporting.plots import Plot
from prune_distill.reporting.results import REFERENCES, TRAINED, Report
from prune_distill.reporting.run_folder import RunFolder
from prune_distill.reporting.words import finite

CANDIDATES_SHOWN = 40


def training(run: RunFolder, report: Report, clean: Clean) -> Iterator[Block]:
    curves = {name: run.stages[stage].lines() for name, stage in TRAINED.items() if stage in run.stages}
    same = _validates_as_evaluated(run)
    validated = "Held-out loss of the students during training" + (
        "." if same else ", on the validation batches: not comparable with the losses of the evaluation."
    )
    shown: list[tuple[Plot | None, str]] = [
        (figures.validation(report["models"], curves, same), validated),
        *(
            (figures.training(lines, name), f"Training loss: {format_label(name)}{_kind(run, name)}.")
            for name, lines in curves.items()
        ),
        (
            figures.recovery_loss(report["recovery"], report["models"]),
            "Recovery: held-out loss of the saved checkpoints over tokens.",
        ),
        *(
            (figures.recovery_task(report["recovery"], task, report["models"]), f"Recovery: {task} over tokens.")
            for task in report["tasks"]
        ),
    ]
    if drawn := draw(shown, clean):
        yield from drawn
        yield Note("Training losses of different kinds are not comparable; the students' held-out losses are.")
    for name, stage in TRAINED.items():
        if stage in run.stages and not curves[name]:
            yield missing(run, stage, f"{format_label(name)}: no step has been recorded")
    if not report["recovery"]:
        yield missing(run, "evaluate", "No recovery curve: checkpoints have not been evaluated")
    yield from _on_policy(run)


def _on_policy(run: RunFolder) -> Iterator[Block]:
    """Show the rounds of on-policy distillation, after a line for the distillation before them."""
    rounds = [name for name in run.stages if name.startswith("distill.on_policy")]
    if not rounds:
        return
    columns = [
        Column("On-policy rounds", text=True),
        Column("Held-out loss", "at the end, validation batches"),
        Column("Completions"),
        Column("Empty"),
        Column("Cut off", "at the limit of tokens"),
        Column("Their tokens"),
    ]
    rows = []
    for name in ("distill", *rounds):
        generated = run.metrics(name.replace("distill", "generate")) if name in rounds else {}
        counts = [generated.get(key) for key in ("completions", "empty", "truncated", "completion_tokens")]
        loss = number_cell(run.metrics(name).get("val_loss"), lambda value: words.number(value, 4))
        rows.append([Cell(name), loss, *(number_cell(count, words.count) for count in counts)])
    yield Table("On-policy rounds", columns, rows)


def _validates_as_evaluated(run: RunFolder) -> bool:
    """Whether validation during the distillation measures on the same tokens as the evaluation."""
    cfg, distill = run.cfg, run.stages.get("distill")
    if cfg is None or distill is None:
        return False
    # A complete stage keeps the value that it was made with.
    batches = distill.manifest.settings.get("distill.val_batches", cfg.distill.val_batches)
    whole = batches is None and cfg.evaluate.max_sequences is None
    return whole and cfg.distill.seq_length == cfg.evaluate.seq_length


def _kind(run: RunFolder, name: str) -> str:
    """Describe the training loss of a student."""
    if name != "student":
        return ", cross-entropy on the data"
    return f", {run.cfg.distill.loss_in_words}" if run.cfg is not None else ""


def pruning(run: RunFolder, report: Report, clean: Clean) -> Iterator[Block]:
    pruning = report["pruning"]
    if pruning is None:
        yield missing(run, "prune", "Nothing has been pruned")
    else:
        kept = pruning.get("kept_layers")
        layers = f" Layers kept: {', '.join(map(str, kept))}." if isinstance(kept, list) else ""
        yield Note(
            f"{words.number(pruning.get('params_before'))} → {words.number(pruning.get('params'))} parameters.{layers}"
        )
    yield from _importance(run, clean)
    yield from _candidates(run, report, clean)


def _importance(run: RunFolder, clean: Clean) -> Iterator[Block]:
    table = run.read("importance", IMPORTANCE)
    if not isinstance(table, dict):
        if "importance" in run.stages:
            yield missing(run, "importance", "Importance has not been measured")
        return
    drawers = {
        "Importance of layers: how much each changes its input.": plots.layer_importance,
        "Importance of attention heads by layer.": plots.head_importance,
        "Importance of FFN channels by layer.": plots.ffn_importance,
        "Importance of hidden channels.": plots.hidden_importance,
    }
    drawn: list[tuple[Plot | None, str]] = []
    for caption, draw_table in drawers.items():
        plot = Plot()
        try:
            draw_table(plot, table)
        except (KeyError, TypeError, ValueError, IndexError):  # a table of another version
            continue
        drawn.append((plot, caption))
    yield from draw(drawn, clean)


def _candidates(run: RunFolder, report: Report, clean: Clean) -> Iterator[Block]:
    stage = (
        "successive_halving"
        if "successive_halving" in run.stages and run.stages["successive_halving"].complete
        else "search"
    )
    table = run.read(stage, CANDIDATES)
    if not isinstance(table, dict):
        if stage in run.stages:
            yield missing(run, stage, "No candidates have been scored")
        return
    choice, teacher = run.read(stage, CHOICE), table.get("teacher")
    drawn: list[tuple[Plot | None, str]] = []
    for cost, caption in (
        ("params", "Candidates: quality against size."),
        ("latency_ms", "Candidates: quality against speed."),
    ):
        rows = figures.candidates(table.get("candidates", []), cost)
        if rows and isinstance(teacher, dict) and finite(teacher.get("loss")) is not None:
            drawn.append((plots.pareto(rows, teacher, cost, report["reference"]), caption))
    yield from draw(drawn, clean)
    rows = figures.candidates(table.get("candidates", []), "params")
    if any(row["rounds"] for row in rows):
        yield Note("Losses just pruned and after a round are measured on different held-out samples.")
    if rows:
        yield _candidate_table(rows, choice if isinstance(choice, dict) else {}, report["reference"])


def _candidate_table(rows: list[Json], choice: Json, reference: str) -> Table:
    scored = any("score" in entry for row in rows for entry in row["rounds"])
    columns = [
        Column("Candidate", text=True),
        Column("Parameters"),
        Column("Latency", "ms"),
        Column("Loss", "just pruned, search's samples"),
        Column("KL", f"to {REFERENCES[reference]}"),
        Column("Loss", "after its last round, validation batches"),
        *([Column("Score", "after its last round")] if scored else []),
        Column("Pareto", text=True),
    ]
    shown = []
    for row in rows[:CANDIDATES_SHOWN]:
        last_round = row["rounds"][-1] if row["rounds"] else {}
        chosen = all(row.get(key) == choice.get(key) for key in ("params", "drop_layers", "hidden_size", "loss"))
        shown.append(
            [
                Cell(
                    plots.shape_words(row),
                    detail=", ".join(filter(None, (plots.describe_dropped_layers(row), "chosen" if chosen else ""))),
                    tone="good" if chosen else "",
                ),
                number_cell(row["params"], words.count),
                number_cell(row.get("latency_ms"), lambda value: words.number(value, 2)),
                number_cell(row["loss"], lambda value: words.number(value, 4)),
                number_cell(row.get("kl"), lambda value: words.number(value, 4)),
                number_cell(
                    last_round.get("val_loss"),
                    lambda value: words.number(value, 4),
                    f"step {last_round['step']}" if "step" in last_round else "",
                ),
                *([_score_cell(last_round.get("score"))] if scored else []),
                Cell("front" if row.get("front") else ""),
            ]
        )
    more = len(rows) - len(shown)
    return Table(
        "Candidates" + (f" (the first {len(shown)}; {more} more in candidates.json)" if more else ""), columns, shown
    )


def _score_cell(score: Any) -> Cell:
    if not isinstance(score, dict):
        return Cell("")
    error = finite(score.get("stderr"))
    detail = "" if error is None else f"± {words.number(error, 3)}"
    return number_cell(score.get("value"), lambda value: words.number(value, 3), detail)


def stages(run: RunFolder, clean: Clean) -> Iterator[Block]:
    timeline = figures.timeline(run.stages)
    yield from draw([(timeline, "When each stage ran; hollow marks are earlier starts.")], clean)
    columns = [
        Column("Stage", text=True),
        Column("State", text=True),
        Column("Started", text=True),
        Column("Time"),
        Column("Starts"),
    ]
    rows = []
    for name, stage in run.stages.items():
        started = stage.manifest.started or (stage.attempts[-1].started if stage.attempts else None)
        rows.append(
            [
                Cell(name),
                Cell(stage.state, tone="bad" if stage.state == "failed" else ""),
                Cell(words.moment(started), started),
                number_cell(stage.manifest.seconds, words.duration),
                number_cell(len(stage.attempts) or None, words.number),
            ]
        )
    yield Table("Stages", columns, rows)
    restarts = [f"{name} {len(stage.attempts)} times" for name, stage in run.stages.items() if len(stage.attempts) > 1]
    if restarts:
        yield Note(f"Started more than once: {', '.join(restarts)}. The time is that of the last process.")
    planned = compare_with_actual(run)
    if planned:
        columns = [Column("What", text=True), Column("Planned", text=True), Column("Actual", text=True)]
        yield Table("Planned and actual", columns, [[Cell(cell) for cell in row] for row in planned])
    else:
        yield Note("This run has no plan (plan.json).", "missing")


def repeat(run: RunFolder, report: Report) -> Iterator[Block]:
    if run.commands:
        yield Code("The commands that launched it, newest last", "\n".join(run.commands[-5:]), folded=False)
    stages = "\n".join(
        shlex.join(["python", "-m", "recipes", name, "--config", "RUN_DIR/resolved.yaml"]) for name in run.stages
    )
    yield Code("Any single stage, from the run's folder", stages)
    yield Code("The full config (resolved.yaml)", run.text or "resolved.yaml cannot be read")
    yield Code("Versions", "\n".join(f"{name}=={version}" for name, version in sorted(report["versions"].items())))
