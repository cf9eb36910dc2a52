"""Sections on the results: models, quality, and samples of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prune_distill.evaluation.results import SourceLoss
from prune_distill.pipeline.names import SAMPLES
from prune_distill.reporting import figures, words
from prune_distill.reporting.blocks import Block, Cell, Column, Note, Sample, Samples, Table
from prune_distill.reporting.cells import (
    Clean,
    agreement,
    benchmarked,
    compute_ratios,
    draw,
    mean_score,
    median,
    missing,
    number_cell,
    score_cell,
)
from prune_distill.reporting.figures import format_label
from prune_distill.reporting.results import (
    LABELS,
    QUANTIZED,
    REFERENCES,
    ModelReport,
    Report,
    count_samples,
    headline,
)
from prune_distill.reporting.run_folder import RunFolder
from prune_distill.reporting.words import finite
from prune_distill.schema import MOST_SOURCE_TEACHERS

# With more tasks, the overview only shows their mean.
TASKS_IN_OVERVIEW = 2
SAMPLES_SHOWN = 8
# The share of questions that a metric counts, by its name in lm-evaluation-harness.
METRICS = {
    "acc": "those whose right choice is the most probable",
    "acc_norm": "those whose right choice has the highest log-probability per byte",
    "acc_mutual_info": "those whose right choice gains the most log-probability from the question",
}
CONTROL = (
    " A control is the same pruned model, trained on the same tokens and steps without a teacher; at small"
    " sizes it can be better."
)


def models(run: RunFolder, report: Report) -> Iterator[Block]:
    models = report["models"]
    if not models:
        yield missing(run, "evaluate", "No model has been evaluated")
        return
    yield _overview(report)
    tokens = next((model["tokens"] for model in models.values() if finite(model.get("tokens")) is not None), None)
    base = REFERENCES[report["reference"]]
    if tokens is not None:
        yield Note(
            f"Held-out loss: mean over {words.number(tokens)} tokens of documents that this run does not train on, with"
            f" plain transformers on the Hugging Face folders. Changes are relative to {base}."
            f"{CONTROL if 'ce' in models else ''}{_engines(models)}"
        )
    folders = {name: model["hf_path"] for name, model in models.items() if model.get("hf_path")}
    if "student" in folders:
        yield Note(f"The student's Hugging Face folder, below the run's folder: {folders['student']}")
    yield _details(models)


def _engines(models: Mapping[str, ModelReport]) -> str:
    """Return a sentence on quantized models: what computed their losses."""
    found = {name: str(model.get("engine") or "") for name, model in models.items() if name in QUANTIZED}
    served = ", ".join(sorted(set(filter(None, found.values()))))
    dequantized = " with dequantized weights, and activations rounded as engines round them"
    if not found:
        return ""
    if not served:
        return f" Quantized models are measured{dequantized}."
    return f" Losses of quantized models are those of {served}, their tasks and samples are measured{dequantized}."


def _overview(report: Report) -> Table:
    models, tasks = report["models"], report["tasks"]
    reference = report["reference"]
    columns = [Column("Model", text=True), Column("Parameters"), Column("Held-out loss", "nats/token")]
    agreeing = any(agreement(model, "top1") is not None for model in models.values())
    columns += [Column("Same next token", "as the teacher")] if agreeing else []
    in_overview = list(tasks) if len(tasks) <= TASKS_IN_OVERVIEW else []
    columns += [Column(task, "score ± error") for task in in_overview]
    columns += [Column("Tasks", "mean score")] if tasks and not in_overview else []
    measured = benchmarked(report)
    columns += [Column("Generation", "tokens/s"), Column("Memory", "peak")] if measured else []
    rows = []
    for name, model in models.items():
        base = {} if name == reference else models.get(reference, {})
        loss = model.get("val_loss")
        row = [
            Cell(format_label(name)),
            number_cell(model.get("params"), words.count, words.change(model.get("params"), base.get("params"))),
            number_cell(loss, lambda value: words.number(value, 4), words.difference(loss, base.get("val_loss"))),
        ]
        if agreeing:
            top1 = agreement(model, "top1")
            kl = agreement(model, "kl")
            row.append(
                number_cell(top1, lambda v: words.percent(v, 1), f"KL {words.number(kl, 3)}" if kl is not None else "")
            )
        row += [score_cell(tasks[task].get(name), tasks[task].get(reference) if base else None) for task in in_overview]
        if tasks and not in_overview:
            row.append(number_cell(mean_score(tasks, name), lambda value: words.number(value, 3)))
        if measured:
            row += _speed_cells(report, name)
        rows.append(row)
    return Table("Models: size, quality, speed", columns, rows)


def _speed_cells(report: Report, name: str) -> list[Cell]:
    measured, ratios = benchmarked(report).get(name, {}), compute_ratios(report, name)
    decode, memory = median(measured.get("decode_tokens_per_second")), finite(measured.get("peak_memory_bytes"))
    return [
        number_cell(
            decode,
            lambda value: words.significant(value, 3),
            words.times(median(ratios["decode"])) if "decode" in ratios else "",
        ),
        number_cell(memory, words.size, words.times(ratios["memory"]) if "memory" in ratios else ""),
    ]


def _details(models: Mapping[str, ModelReport]) -> Table:
    columns = [Column("Model", text=True), Column("Perplexity"), Column("Bits per byte")]
    columns += [Column(label) for label in ("Layers", "Hidden size", "FFN", "Heads", "Query groups")]
    units = ("perplexity", "bits_per_byte")
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    rows = [
        [
            Cell(format_label(name)),
            *(number_cell(model.get(key), lambda value: words.number(value, 3)) for key in units),
            *(number_cell(model.get(key), words.number) for key in sizes),
        ]
        for name, model in models.items()
    ]
    return Table("Loss in other units, and shapes", columns, rows)


def quality(run: RunFolder, report: Report, clean: Clean) -> Iterator[Block]:
    models, tasks = report["models"], report["tasks"]
    if tasks:
        table = _task_table(report)
        yield table
        shown = {row[1].text for row in table.rows}
        explained = [f"{metric}, {share}" for metric, share in METRICS.items() if metric in shown]
        if explained:
            yield Note(f"Scores are shares of the questions: {'; '.join(explained)}.")
    else:
        yield (
            missing(run, "evaluate", "No tasks were scored") if not models else Note("No tasks were scored.", "missing")
        )
    yield from draw([(figures.scores(tasks), "Scores by task; whiskers are one standard error.")], clean)
    by_source = {
        name: model["per_source"] for name, model in models.items() if isinstance(model.get("per_source"), dict)
    }
    if by_source:
        yield _source_table(by_source, report["reference"])
    if report["correction"]:
        correction = report["correction"]
        yield Note(
            f"Before the distillation, the teacher was trained on {words.number(correction.get('tokens'))} tokens of"
            " its data: its validation loss changed from"
            f" {words.number(correction.get('val_loss_before'), 4)} to"
            f" {words.number(correction.get('val_loss_after'), 4)} nats per token."
        )
    if report["checks"]:
        labels = {
            "import_max_abs_logit_diff": f"{LABELS[report['reference']]}, after import",
            "teacher_import_max_abs_logit_diff": "Teacher, after import",
            **{
                f"source_teacher{number}_import_max_abs_logit_diff": f"Source teacher {number}, after import"
                for number in range(1, MOST_SOURCE_TEACHERS + 1)
            },
            "export_max_abs_logit_diff": "Student, after export",
        }
        columns = [Column("Logits, NeMo and Hugging Face", text=True), Column("Largest difference")]
        rows = [
            [Cell(labels.get(key, key)), number_cell(value, lambda v: words.significant(v, 2))]
            for key, value in report["checks"].items()
        ]
        yield Table("Checks of both conversions", columns, rows)


def _task_table(report: Report) -> Table:
    models, tasks, reference = report["models"], report["tasks"], report["reference"]
    names = [name for name in models if any(name in task_scores for task_scores in tasks.values())]
    columns = [
        Column("Task", text=True),
        Column("Metric", text=True),
        Column("Questions"),
        *(Column(format_label(name)) for name in names),
    ]
    rows = []
    for task, task_scores in tasks.items():
        some = next(iter(task_scores.values()))
        metric = next(
            (found[0] for scores in task_scores.values() if (found := headline(scores)) is not None), words.NOTHING
        )
        cells = [
            score_cell(task_scores.get(name), task_scores.get(reference) if name != reference else None)
            for name in names
        ]
        rows.append([Cell(task), Cell(metric), number_cell(count_samples(some), words.number), *cells])
    title = f"Tasks: score ± one standard error, and the change relative to {REFERENCES[reference]}"
    return Table(title, columns, rows)


def _source_table(by_source: Mapping[str, Mapping[str, SourceLoss]], reference: str) -> Table:
    sources = list(dict.fromkeys(source for found in by_source.values() for source in found))
    columns = [Column("Source", text=True), Column("Tokens"), *(Column(format_label(name)) for name in by_source)]
    rows = []
    for source in sources:
        entries = {name: found[source] for name, found in by_source.items() if isinstance(found.get(source), dict)}
        tokens = next((entry.get("tokens") for entry in entries.values()), None)
        base = entries.get(reference, {}).get("val_loss")
        cells = []
        for name in by_source:
            loss = entries.get(name, {}).get("val_loss")
            difference = words.difference(loss, base) if name != reference else ""
            cells.append(number_cell(loss, lambda value: words.number(value, 4), difference))
        rows.append([Cell(source), number_cell(tokens, words.number), *cells])
    return Table("Held-out loss by source (nats per token)", columns, rows)


def samples(run: RunFolder) -> Iterator[Block]:
    # Every stage continues the same prompts, in the same order.
    texts: dict[tuple[int, str, str], dict[str, str]] = {}
    for stage in run.evaluations():
        found = stage.read(SAMPLES)
        for number, entry in enumerate(found if isinstance(found, list) else []):
            own = entry.get("texts") if isinstance(entry, dict) else None
            if isinstance(own, dict):
                beginning = number, str(entry.get("prompt", "")), str(entry.get("reference", ""))
                texts.setdefault(beginning, {}).update({name: str(text) for name, text in own.items()})
    samples = []
    for (_, prompt, reference), own in texts.items():
        ordered = sorted(own.items(), key=lambda item: item[0] not in REFERENCES)
        samples.append(Sample(prompt, reference, [(format_label(name), text) for name, text in ordered]))
    if not samples:
        yield missing(run, "evaluate", "No text has been generated")
        return
    yield Note("Greedy continuations of the beginnings of held-out documents.")
    yield Samples(samples[:SAMPLES_SHOWN])
