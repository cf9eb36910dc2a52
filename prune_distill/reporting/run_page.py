"""The page of one run: the task, the results, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator

from prune_distill.config.values import describe_teachers
from prune_distill.reporting import outcome_sections, speed_section, words, work_sections
from prune_distill.reporting.blocks import Block, Code, Note, Page, Section, Tile, Tiles
from prune_distill.reporting.cells import Clean, agreement, compute_ratios, median, spread_words
from prune_distill.reporting.results import REFERENCES, ModelReport, Report
from prune_distill.reporting.run_folder import RunFolder
from prune_distill.reporting.words import finite
from prune_distill.schema import RunConfig

STATES = {
    "complete": "complete",
    "failed": "failed",
    "running": "running",
    "interrupted": "interrupted",
    "paused": "paused",
    "unfinished": "not finished",
}


def page(run: RunFolder, report: Report, clean: Clean) -> Page:
    """Build the page of a run.

    Args:
        report: result of `results.summarize`.
        clean: removes private information from a text.
    """
    sections = [
        Section("models", "Models", list(outcome_sections.models(run, report))),
        Section("quality", "Quality", list(outcome_sections.quality(run, report, clean))),
        Section("training", "Training", list(work_sections.training(run, report, clean))),
        Section("speed", "Speed and memory", list(speed_section.speed(run, report, clean))),
        Section("pruning", "Pruning", list(work_sections.pruning(run, report, clean))),
        Section("samples", "Samples of text", list(outcome_sections.samples(run))),
        Section("run", "The run", list(work_sections.stages(run, clean))),
        Section("repeat", "Commands and config", list(work_sections.repeat(run, report))),
    ]
    return Page(
        title=f"{run.name}: pruned and distilled",
        heading=run.name,
        meta=_meta(run, report),
        state=STATES[report["state"]],
        asked=_describe_task(run.cfg) if run.cfg is not None else "",
        lead=outcome(report),
        blocks=list(_opening(run, report)),
        sections=sections,
    )


def outcome(report: Report) -> str:
    """Summarize the results in one or two sentences."""
    models = report["models"]
    reference, student, pruned = models.get(report["reference"]), models.get("student"), models.get("pruned")
    teacher = models.get("teacher") if report["reference"] != "teacher" else None
    if student is None or finite(student.get("val_loss")) is None:
        return "No student has been evaluated yet."
    sentence = f"held-out loss is {words.number(student['val_loss'], 3)} nats per token"
    whose = f"{REFERENCES[report['reference']]}'s"
    if reference is not None:
        sentence += f", {_format_difference(student, reference, 'above', 'below')} {whose}"
    if teacher is not None:
        sentence += f", {_format_difference(student, teacher, 'above', 'below')} the teacher's"
    if pruned is not None:
        sentence += f" and {_format_difference(student, pruned, 'worse', 'better')} than just pruned"
    if reference is not None and finite(reference.get("params")) and finite(student.get("params")):
        share = words.percent(student["params"] / reference["params"])
        return f"The student keeps {share} of {whose} parameters. Its {sentence}.{_describe_speed(report)}"
    return f"The student's {sentence}.{_describe_speed(report)}"


def _format_difference(one: ModelReport, other: ModelReport, more: str, less: str) -> str:
    a, b = finite(one.get("val_loss")), finite(other.get("val_loss"))
    if a is None or b is None:
        return f"not comparable {more} or {less}"
    return f"{words.number(abs(a - b), 3)} {more if a >= b else less}"


def _describe_speed(report: Report) -> str:
    ratios = compute_ratios(report, "student")
    decode = median(ratios.get("decode"))
    if decode is None:
        return ""
    memory = finite(ratios.get("memory"))
    memory_words = f", and uses {words.percent(memory)} of the memory" if memory is not None else ""
    return f" It generates text {words.times(decode)} as fast as {REFERENCES[report['reference']]}{memory_words}."


def _describe_task(cfg: RunConfig) -> str:
    """Describe the task of a run."""
    prune, shape = cfg.prune, cfg.model.shape
    if prune.budget is not None:
        limits = {
            "parameters": (prune.budget.params, prune.budget.params_fraction),
            "GB of memory": (prune.budget.memory_gb, prune.budget.memory_fraction),
            "ms per forward pass": (prune.budget.latency_ms, prune.budget.latency_fraction),
        }
        budgets = [
            f"{words.count(absolute)} {name}" if absolute is not None else f"{words.percent(share, 1)} of the {name}"
            for name, (absolute, share) in limits.items()
            if absolute is not None or share is not None
        ]
        sizes = f"to the best shape that the search finds within {', '.join(budgets)}"
    else:
        axes = {
            "num_layers": "layers",
            "hidden_size": "hidden size",
            "ffn_hidden_size": "FFN",
            "num_attention_heads": "heads",
            "num_query_groups": "query groups",
        }
        cuts = [
            f"{name} {getattr(shape, axis)} → {getattr(prune, axis)}"
            for axis, name in axes.items()
            if getattr(prune, axis) is not None
        ]
        if prune.drop_layers:
            cuts.insert(0, f"without layers {', '.join(map(str, prune.drop_layers))}")
        sizes = f"({', '.join(cuts)})"
    steps = f"{cfg.distill.max_steps:,} steps"
    plan = f"Prune {cfg.model.name} {sizes}, then distill for {steps} with {cfg.distill.loss_in_words}."
    return f"{plan} {describe_teachers(cfg)}".rstrip()


def _meta(run: RunFolder, report: Report) -> str:
    seconds = [finite(stage["seconds"]) or 0.0 for stage in report["stages"].values()]
    started = [stage.manifest.started for stage in run.stages.values()]
    first = min((moment for moment in started if moment is not None), default=None)
    parts = [
        run.cfg.model.name if run.cfg is not None else "",
        {"cpu": "on a CPU", "gpu": "on GPUs"}.get(str(report["backend"]), ""),
        words.moment(first) if first is not None else "",
        f"stages took {words.duration(sum(seconds))}" if any(seconds) else "",
        _code(report["git_commits"]),
    ]
    return " · ".join(filter(None, parts))


def _code(commits: dict[str, list[str]]) -> str:
    """Format the commits of the code; with their stages, if there are several."""
    if len(commits) < 2:
        return "".join(f"code {commit}" for commit in commits)
    return "code " + "; ".join(f"{commit} ({', '.join(stages)})" for commit, stages in commits.items())


def _opening(run: RunFolder, report: Report) -> Iterator[Block]:
    for name, stage in run.stages.items():
        if stage.state == "failed":
            yield Note(f"Stage {name} failed. Fix the cause, then run the same command to resume.", "failure")
            yield Code(f"Why {name} failed: the end of its log", stage.cause or "", folded=False)
        elif stage.state == "paused":
            at = f" at step {stage.step:,}" if stage.step is not None else ""
            yield Note(f"Stage {name} is paused{at}; run the same command to resume it. {stage.cause or ''}", "warning")
        elif stage.state == "interrupted":
            yield Note(f"Stage {name} was interrupted; run the same command to resume it.", "warning")
        elif stage.state == "running":
            yield Note(f"Stage {name} was running when this was written.{_progress(run, name)}", "warning")
        elif stage.state == "submitted":
            yield Note(f"Stage {name} is a Slurm job; `python -m launch.status` shows its state.", "warning")
    for note in run.notes:
        yield Note(note, "warning")
    if report["models"]:
        yield Tiles(list(_tiles(report)))


def _progress(run: RunFolder, name: str) -> str:
    newest: dict[str, float | None] = {}
    for line in run.stages[name].lines():
        newest.update(line)
    if "step" not in newest:
        return ""
    left = f", {words.duration(newest['seconds_left'])} left" if "seconds_left" in newest else ""
    return f" Step {words.number(newest['step'])} of {words.number(newest.get('max_steps'))}{left}."


def _tiles(report: Report) -> Iterator[Tile]:
    models = report["models"]
    reference, student = models.get(report["reference"], {}), models.get("student", {})
    whom = REFERENCES[report["reference"]]
    if finite(student.get("params")) is not None:
        yield Tile(
            "Parameters",
            words.count(student["params"]),
            f"{words.change(student['params'], reference.get('params'))} from {words.count(reference.get('params'))}",
        )
    loss, base_loss = finite(student.get("val_loss")), finite(reference.get("val_loss"))
    if loss is not None:
        difference = f"{words.signed(loss - base_loss, 3)} relative to {whom}" if base_loss is not None else ""
        yield Tile("Held-out loss", words.number(loss, 3), difference)
    top1 = agreement(student, "top1")
    if top1 is not None:
        yield Tile("Same next token", words.percent(top1, 1), "as the teacher's, on held-out text")
    ratios = compute_ratios(report, "student")
    if median(ratios.get("decode")) is not None:
        yield Tile(
            "Generation",
            words.times(median(ratios["decode"])),
            f"{whom}'s speed, {spread_words(ratios['decode'])}",
        )
    if finite(ratios.get("memory")) is not None:
        yield Tile("Memory", words.times(ratios["memory"]), f"{whom}'s peak")
