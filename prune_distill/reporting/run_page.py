"""The page of one run: what was asked, what came out, and what is missing, each said in its place."""

from __future__ import annotations

from collections.abc import Iterator

from prune_distill.reporting import outcome_sections, words, work_sections
from prune_distill.reporting.blocks import Block, Code, Note, Page, Section, Tile, Tiles
from prune_distill.reporting.cells import Clean, agreement, compute_ratios, median, spread_words
from prune_distill.reporting.results import ModelReport, Report
from prune_distill.reporting.run_folder import RunFolder
from prune_distill.reporting.words import finite
from prune_distill.schema import RunConfig

STATES = {
    "complete": "complete",
    "failed": "failed",
    "running": "running",
    "paused": "paused",
    "unfinished": "not finished",
}


def page(run: RunFolder, report: Report, clean: Clean) -> Page:
    """The page of a run.

    Args:
        report: what `results.summarize` returned.
        clean: takes out of a text what no report may show.
    """
    sections = [
        Section("models", "Models", list(outcome_sections.models(run, report))),
        Section("quality", "Quality", list(outcome_sections.quality(run, report, clean))),
        Section("training", "Training", list(work_sections.training(run, report, clean))),
        Section("speed", "Speed and memory", list(outcome_sections.speed(run, report, clean))),
        Section("pruning", "Pruning", list(work_sections.pruning(run, report, clean))),
        Section("samples", "Samples of text", list(outcome_sections.samples(run))),
        Section("run", "The run", list(work_sections.stages(run, clean))),
        Section("repeat", "To repeat it", list(work_sections.repeat(run, report))),
    ]
    return Page(
        title=f"{run.name}: pruned and distilled",
        heading=run.name,
        meta=_meta(run, report),
        state=STATES[report["state"]],
        asked=_asked(run.cfg) if run.cfg is not None else "",
        lead=outcome(report),
        blocks=list(_opening(run, report)),
        sections=sections,
    )


def outcome(report: Report) -> str:
    """What came out, in a sentence or two."""
    models = report["models"]
    teacher, student, pruned = models.get("teacher"), models.get("student"), models.get("pruned")
    if student is None or finite(student.get("val_loss")) is None:
        return "No student has been evaluated yet."
    sentence = f"held-out loss is {words.number(student['val_loss'], 3)} nats per token"
    if teacher is not None:
        sentence += f", {_apart(student, teacher, 'above', 'below')} the teacher's"
    if pruned is not None:
        sentence += f" and {_apart(student, pruned, 'worse', 'better')} than just pruned"
    if teacher is not None and finite(teacher.get("params")) and finite(student.get("params")):
        share = words.percent(student["params"] / teacher["params"])
        return f"The student keeps {share} of the teacher's parameters. Its {sentence}.{_faster(report)}"
    return f"The student's {sentence}.{_faster(report)}"


def _apart(one: ModelReport, other: ModelReport, more: str, less: str) -> str:
    a, b = finite(one.get("val_loss")), finite(other.get("val_loss"))
    if a is None or b is None:
        return f"not comparable {more} or {less}"
    return f"{words.number(abs(a - b), 3)} {more if a >= b else less}"


def _faster(report: Report) -> str:
    ratios = compute_ratios(report, "student")
    decode = median(ratios.get("decode"))
    if decode is None:
        return ""
    memory = finite(ratios.get("memory"))
    took = f", and takes {words.percent(memory)} of the memory" if memory is not None else ""
    return f" It generates text {words.times(decode)} as fast as the teacher{took}."


def _asked(cfg: RunConfig) -> str:
    """What a run was asked to do."""
    prune, shape = cfg.prune, cfg.model.shape
    if prune.budget is not None:
        limits = {
            "parameters": (prune.budget.params, prune.budget.params_fraction),
            "GB of memory": (prune.budget.memory_gb, prune.budget.memory_fraction),
            "ms a forward pass": (prune.budget.latency_ms, prune.budget.latency_fraction),
        }
        told = [
            f"{words.count(absolute)} {name}" if absolute is not None else f"{words.percent(share, 1)} of the {name}"
            for name, (absolute, share) in limits.items()
            if absolute is not None or share is not None
        ]
        sizes = f"to what its search finds within {', '.join(told)}"
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
    return f"Prune {cfg.model.name} {sizes}, then distil for {steps} with {cfg.distill.loss_in_words}."


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
    """The commits that made a run; which stages each made, where there are several."""
    if len(commits) < 2:
        return "".join(f"code {commit}" for commit in commits)
    return "code " + "; ".join(f"{commit} ({', '.join(stages)})" for commit, stages in commits.items())


def _opening(run: RunFolder, report: Report) -> Iterator[Block]:
    for name, stage in run.stages.items():
        if stage.state == "failed":
            yield Note(f"Stage {name} failed. The same command goes on from there once its cause is fixed.", "failure")
            yield Code(f"Why {name} failed: the end of its log", stage.cause or "", folded=False)
        elif stage.state == "paused":
            at = f" at step {stage.step:,}" if stage.step is not None else ""
            yield Note(
                f"Stage {name} is paused{at}; the same command goes on from there. {stage.cause or ''}", "warning"
            )
        elif stage.state == "running":
            yield Note(f"Stage {name} was running when this was written.{_progress(run, name)}", "warning")
        elif stage.state == "submitted":
            yield Note(
                f"Stage {name} is a Slurm job; `python -m launch.status` says whether it waits or runs.", "warning"
            )
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
    teacher, student = models.get("teacher", {}), models.get("student", {})
    if finite(student.get("params")) is not None:
        yield Tile(
            "Parameters",
            words.count(student["params"]),
            f"{words.change(student['params'], teacher.get('params'))} against {words.count(teacher.get('params'))}",
        )
    loss, teacher_loss = finite(student.get("val_loss")), finite(teacher.get("val_loss"))
    if loss is not None:
        against = f"{words.signed(loss - teacher_loss, 3)} against the teacher" if teacher_loss is not None else ""
        yield Tile("Held-out loss", words.number(loss, 3), against)
    top1 = agreement(student, "top1")
    if top1 is not None:
        yield Tile("Same next token", words.percent(top1, 1), "as the teacher's, on held-out text")
    ratios = compute_ratios(report, "student")
    if median(ratios.get("decode")) is not None:
        yield Tile(
            "Generation",
            words.times(median(ratios["decode"])),
            f"the teacher's speed, {spread_words(ratios['decode'])}",
        )
    if finite(ratios.get("memory")) is not None:
        yield Tile("Memory", words.times(ratios["memory"]), "the teacher's peak")
