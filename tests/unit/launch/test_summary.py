"""What is printed at the end of a run, and the look at the disk before it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.load import compose
from conf.schema import RunConfig
from launch.disk import bytes_needed, disk_warning, parameters
from launch.summary import summary
from recipes.artifact import locate, write_json, write_manifest


def test_stages_with_their_times_and_the_reports_figures(demo: Callable[..., RunConfig], tmp_path: Path) -> None:
    located = list(locate(demo()).values())
    for number, stage in enumerate(located):
        write_manifest(stage, 0.0, 60.0 + number, {})
    report = {"models": {"teacher": {"params": 5_250_000, "val_loss": 3.588}, "student": {"params": 3_000_000}}}
    folder = located[-1].folder
    write_json(folder / "report.json", report)
    text = summary(located)
    assert "  demo_model        1:00\n" in text
    assert "  evaluate          1:08\n" in text
    assert "teacher        5.25 M parameters  val loss 3.5880\n" in text
    assert f"report: {folder / 'report.json'}" in text
    (folder / "index.html").write_text("")
    assert f"report: {folder / 'index.html'}" in summary(located)
    (folder / "report.json").write_text("{")
    assert "report:" not in summary(located)


@pytest.mark.parametrize(
    ("model", "billions"),
    # As published: 8.19 B, 0.60 B (0.75 B with the embedding counted twice), 8.03 B.
    [("qwen3_8b_to_6b_depth", 8.19), ("qwen3_0_6b_one_gpu", 0.596), ("llama3_1_8b_to_4b_depth", 8.03)],
)
def test_parameters(model: str, billions: float) -> None:
    shape = compose([f"experiment={model}"]).model.shape
    assert shape is not None
    # Norms, left out of the count, are less than 0.1 %.
    assert parameters(shape) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_a_small_disk(demo: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = demo()
    assert disk_warning(cfg, tmp_path) is None
    assert cfg.model.shape is not None
    need = bytes_needed(cfg, cfg.model.shape)
    monkeypatch.setattr("launch.disk.free_bytes", lambda path: need - 1)
    warning = disk_warning(cfg, tmp_path)
    assert warning is not None
    assert f"about {need / 1e9:.1f} GB" in warning
    assert json.dumps(str(tmp_path))[1:-1] in warning
    cfg.model.shape = None
    assert disk_warning(cfg, tmp_path) is None
