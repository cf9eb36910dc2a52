"""Model cards with a run's results: the card of each exported student, continued by what was measured later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prune_distill.atomic_files import write_text
from prune_distill.reporting import words
from prune_distill.reporting.cells import Clean, agreement, benchmark_settings, benchmarked, load_by_rate, median
from prune_distill.reporting.figures import format_label
from prune_distill.reporting.results import QUANTIZED, Report, headline
from prune_distill.reporting.run_folder import RunFolder

CARDS = "cards"
_STUDENTS = ("student", *QUANTIZED)


def write(run: RunFolder, report: Report, out: Path, clean: Clean) -> list[str]:
    """Write `cards/NAME.md` for each evaluated student, and remove other cards there.

    Returns:
        Their paths, relative to `out`.
    """
    cards = {f"{CARDS}/{name}.md": card for name in _STUDENTS if (card := _card(run, report, name)) is not None}
    (out / CARDS).mkdir(parents=True, exist_ok=True)
    for path in (out / CARDS).glob("*.md"):
        if f"{CARDS}/{path.name}" not in cards:
            path.unlink()
    for name, card in cards.items():
        write_text(out / name, clean(card))
    return list(cards)


def _card(run: RunFolder, report: Report, name: str) -> str | None:
    """Return the card of a model with its results; None if the model was not evaluated, or has no card."""
    model = report["models"].get(name)
    folder = None if model is None else model.get("engine_path", model.get("hf_path"))
    try:
        card = None if folder is None else (run.path / folder / "README.md").read_text(errors="replace")
    except OSError:
        card = None
    return None if card is None else "\n".join([card.rstrip(), *_results(report, name)]) + "\n"


def _results(report: Report, name: str) -> Iterator[str]:
    compared = dict.fromkeys((report["reference"], "teacher", "student", name))
    models = [found for found in compared if found in report["models"]]
    yield from ("", "## Results", "")
    tasks = report["tasks"]
    scores = [_task_name(task, scores) for task, scores in tasks.items()]
    rows = []
    for found in models:
        entry = report["models"][found]
        same = agreement(entry, "top1")
        cells = [words.number(entry.get("val_loss"), 4), words.NOTHING if same is None else words.percent(same, 1)]
        for task in tasks.values():
            score = headline(task.get(found, {}))
            cells.append(words.NOTHING if score is None else words.number(score[1], 3))
        rows.append([_name(found, name), *cells])
    yield from _table(["", "held-out loss, nats per token", "same next token as the teacher", *scores], rows)
    engine = report["models"][name].get("engine")
    if engine is not None:
        yield from ("", f"Its loss is that of {engine}.")
    yield from _speed(report, name, models)


def _task_name(task: str, scores: Mapping[str, object]) -> str:
    metrics = [found[0] for entry in scores.values() if isinstance(entry, dict) and (found := headline(entry))]
    return f"{task} ({metrics[0]})" if metrics else task


def _speed(report: Report, name: str, models: Sequence[str]) -> Iterator[str]:
    """Speeds and sizes, of the same run of the benchmark."""
    measured = benchmarked(report)
    if name not in measured:
        return
    rates = list(load_by_rate(measured[name]))
    rows = []
    for found in (found for found in models if found in measured):
        own = measured[found]
        load = load_by_rate(own)
        served = [median(load.get(rate, {}).get("output_tokens_per_second")) for rate in rates]
        speeds = [median(own.get(f"{phase}_tokens_per_second")) for phase in ("prefill", "decode")]
        rows.append(
            [
                _name(found, name),
                *map(words.significant, speeds),
                words.duration(median(own.get("time_to_first_token_seconds"))),
                words.size(own.get("weights_bytes")),
                *map(words.significant, served),
            ]
        )
    heads = ["", "prefill, tokens/s", "generation, tokens/s", "first token after", "weights"]
    yield ""
    yield from _table([*heads, *(f"server, {_rate(rate)}: tokens/s" for rate in rates)], rows)
    yield from ("", f"Medians of interleaved rounds: {', '.join(benchmark_settings(report))}.")


def _rate(rate: str) -> str:
    return f"{rate} requests/s" if rate[0].isdigit() else rate


def _name(found: str, name: str) -> str:
    return "this model" if found == name else format_label(found)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (heads, ["---"] * len(heads), *rows):
        yield f"| {' | '.join(row)} |"
