"""What is printed at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from launch.progress import summary
from prune_distill.pipeline.artifact import locate, write_json, write_manifest
from prune_distill.schema import RunConfig


def test_stages_with_their_times_and_the_reports_figures(demo: Callable[..., RunConfig], tmp_path: Path) -> None:
    located = list(locate(demo()).values())
    for number, stage in enumerate(located):
        write_manifest(stage, 0.0, 60.0 + number, {})
    student = {"params": 3_000_000, "val_loss": None}
    report = {"models": {"teacher": {"params": 5_250_000, "val_loss": 3.588}, "student": student}}
    folder = located[-1].folder
    write_json(folder / "report.json", report)
    text = summary(located)
    rows = [line.split() for line in text.splitlines()]
    assert ["demo_model", "1:00"] in rows
    evaluate = [stage.stage.name for stage in located].index("evaluate")
    assert ["evaluate", f"1:{evaluate:02}"] in rows
    assert "teacher        5.25 M parameters  val loss 3.5880\n" in text
    assert f"report: {folder / 'report.json'}" in text
    (folder / "index.html").write_text("")
    assert f"report: {folder / 'index.html'}" in summary(located)
    (folder / "report.json").write_text("{")
    assert "report:" not in summary(located)
