"""python -m recipes.report --config RUN_DIR/resolved.yaml

What came out of a run, for people (`report/index.html`, one file that needs no network) and programs (`report.json`).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from recipes.artifact import identity_view, library_versions, read_manifest, write_json
from recipes.runtime import plots
from recipes.runtime.metrics_file import read_metrics
from recipes.runtime.plots import GREY
from recipes.runtime.stage_main import stage_main

# How the report calls a model, in the order of its tables.
LABELS = {
    "teacher": "Teacher",
    "corrected_teacher": "Teacher, corrected",
    "pruned": "Just pruned",
    "student": "Student (distilled)",
    "ce": "Control (no teacher)",
    "scratch": "Control (from scratch)",
}
COLOURS = {"teacher": GREY, "pruned": "#b8860b", "student": "#2e8b57", "ce": "#4169e1", "scratch": "#b03060"}


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: the folder of every stage before. Output: `report.json`, `index.html`."""
    manifests = {name: read_manifest(folder) or {} for name, folder in inputs.items()}
    report = summarize(cfg, manifests)
    write_json(out / "report.json", report)
    curves = {
        name: read_metrics(inputs[stage] / "metrics.jsonl")
        for name, stage in (("student", "distill"), ("ce", "distill.ce"), ("scratch", "distill.scratch"))
        if stage in inputs
    }
    partial = out / ".index.html"
    partial.write_text(render(cfg, report, curves, _pruning_plots(inputs)))
    partial.replace(out / "index.html")
    return {name: model["val_loss"] for name, model in report["models"].items()}


def summarize(cfg: RunConfig, manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of `report.json`; paths are relative to the run's folder.

    Args:
        manifests: the manifest of each complete stage, by stage name.
    """
    evaluation = manifests["evaluate"]
    models = {}
    for name, metrics in evaluation["metrics"].items():
        path = evaluation["inputs"][name]["path"]
        inside = isinstance(path, str) and not path.startswith(("/", ".."))
        # A teacher of the user's is outside the run, or on the Hub: its place is no part of the report.
        made_here = name != "teacher" or cfg.model.demo is not None
        models[name] = {**metrics, **({"hf_path": path} if inside and made_here else {})}
    return {
        "experiment": cfg.name,
        "backend": manifests["distill"]["metrics"]["backend"],
        "versions": library_versions(),
        "git_commit": evaluation["git_commit"],
        "models": models,
        "checks": {
            key: value for key, value in manifests.get("verify", {}).get("metrics", {}).items() if key.endswith("_diff")
        },
        "pruning": manifests["prune"]["metrics"],
        "correction": manifests.get("correct_teacher", {}).get("metrics"),
        "stages": {
            name: {"status": manifest["status"], "seconds": manifest["seconds"]} for name, manifest in manifests.items()
        },
    }


def _pruning_plots(inputs: dict[str, Any]) -> list[str]:
    """What the stages of pruning drew: importance, and the candidates (of the tournament, where there was one)."""
    candidates = "tournament" if "tournament" in inputs else "search"
    files = [
        inputs[stage] / name
        for stage, name in (("importance", "importance.svg"), (candidates, "pareto.svg"))
        if stage in inputs
    ]
    return [_inline(path.read_text(), path.stem) for path in files]


def render(
    cfg: RunConfig,
    report: dict[str, Any],
    curves: dict[str, list[dict[str, Any]]],
    pruning_plots: Sequence[str] = (),
) -> str:
    """The report's page.

    Args:
        curves: the lines of `metrics.jsonl` of each trained student.
        pruning_plots: SVG elements.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report.html.j2").render(
        cfg=cfg,
        report=report,
        labels=LABELS,
        config=json.dumps({"prune": identity_view(cfg.prune), "distill": identity_view(cfg.distill)}, indent=2),
        validation_plot=_validation_plot(report["models"], curves),
        training_plot=_training_plot(cfg, curves),
        pruning_plots=pruning_plots,
        gain=report["models"]["pruned"]["val_loss"] - report["models"]["student"]["val_loss"],
        gap=report["models"]["student"]["val_loss"] - report["models"]["teacher"]["val_loss"],
        share=report["models"]["student"]["params"] / report["models"]["teacher"]["params"],
    )


def _validation_plot(models: dict[str, Any], curves: dict[str, list[dict[str, Any]]]) -> str:
    figure, (axes,) = _figure(1, "held-out loss (nats per token)")
    for name in ("teacher", "pruned"):
        axes.axhline(models[name]["val_loss"], color=COLOURS[name], linestyle="--", label=LABELS[name])
    for name, lines in curves.items():
        points = [(0, models["pruned"]["val_loss"])] + [
            (ln["step"], ln["val_loss"]) for ln in lines if "val_loss" in ln
        ]
        axes.plot(*zip(*points, strict=True), color=COLOURS[name], marker="o", label=LABELS[name])
    figure.legend(loc="outside upper center", ncols=4, frameon=False, labelcolor=GREY)
    return _svg(figure, "Held-out loss of the students during distillation, between the pruned model and the teacher")


def _training_plot(cfg: RunConfig, curves: dict[str, list[dict[str, Any]]]) -> str:
    """A panel a student: their losses are of different kinds."""
    figure, panels = _figure(len(curves), "training loss (nats per token)")
    for axes, (name, lines) in zip(panels, curves.items(), strict=True):
        points = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        axes.plot(*zip(*points, strict=True), color=COLOURS[name])
        kind = cfg.distill.loss_in_words if name == "student" else "cross-entropy"
        axes.set_title(f"{LABELS[name].split(':')[0]}: {kind}", color=GREY, fontsize="medium")
    return _svg(figure, "Training loss of each student")


def _figure(panels: int, y_label: str) -> tuple[Any, Any]:
    figure, row = plots.figure(panels, (7.2, 3.6))
    row[0].set_ylabel(y_label, color=GREY)
    for axes in row:
        axes.set_xlabel("distillation step", color=GREY)
    return figure, row


def _svg(figure: Any, description: str) -> str:
    buffer = io.StringIO()
    plots.save_svg(figure, buffer)
    return _inline(buffer.getvalue(), description)


def _inline(svg: str, description: str) -> str:
    """An SVG file as an element of the page."""
    svg = svg[svg.index("<svg") :]
    # The size comes from the page, the shape from the viewBox.
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


if __name__ == "__main__":
    stage_main(run, "report")
