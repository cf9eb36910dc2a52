"""The status of a run on this machine, without Slurm."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launch.planning.automatic import compose
from launch.records import write_interim_report
from launch.status import main, status
from prune_distill.config.load import save_resolved
from prune_distill.pipeline.artifact import locate, read_state, write_manifest
from prune_distill.pipeline.names import LAUNCHES, LOG, PLAN, RESOLVED
from tests.helpers.fake_stage import TABLE
from tests.helpers.launches import run_launcher, wait_for


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.queue.shutil.which", lambda name: None)


def states(run_dir: Path) -> list[str]:
    return [stage.state for stage in status(run_dir, TABLE)]


def test_a_run_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_launcher(tmp_path, {"first": "train", "second": "fail"}) as launcher:
        wait_for(tmp_path, "first")
        while not list(tmp_path.glob("first*/metrics.jsonl")):
            time.sleep(0.05)
        first = status(tmp_path, TABLE)[0]
        assert first.state == "running"
        assert first.detail == "step 40/150, cross-entropy 2.500, val cross-entropy 3.250, 1,234 tokens/s, 1:15 left"
        assert first.figures["tokens_per_second"] == 1234.5
        launcher.communicate(timeout=60)
    assert states(tmp_path) == ["complete", "failed", "to do", "to do"]
    assert json.loads((tmp_path / PLAN).read_text())["experiment"] == "demo"
    assert f"run_dir={tmp_path}" in json.loads((tmp_path / LAUNCHES).read_text())["command"]
    report = (tmp_path / "report" / "index.html").read_text()
    assert "Stage second failed." in report
    assert "ZeroDivisionError: nothing by nothing" in report
    assert main([str(tmp_path)], TABLE) == 0
    message = capsys.readouterr().out
    assert "second failed:\n" in message
    assert "ZeroDivisionError: nothing by nothing\n" in message
    assert str(next(tmp_path.glob("second*")) / "log.txt") in message
    with run_launcher(tmp_path, {}) as launcher:
        launcher.communicate(timeout=60)
    assert states(tmp_path) == ["complete"] * 4
    assert main([str(tmp_path), "--json", "--watch"], TABLE) == 0
    (stages,) = json.loads(capsys.readouterr().out).values()
    assert [stage["cause"] for stage in stages] == [None] * 4


def test_a_failed_report_does_not_fail_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_interim_report(tmp_path)
    assert capsys.readouterr().out.startswith("cannot write the report: error: ")


def test_a_paused_stage_is_not_a_failure_and_resumes(tmp_path: Path) -> None:
    plan = {"second": "steps 60"}
    with run_launcher(tmp_path, plan) as launcher:
        wait_for(tmp_path, "second")
        (folder,) = tmp_path.glob("second*")
        (folder / "stop").touch()
        _, message = launcher.communicate(timeout=60)
    step = read_state(folder)["step"]
    assert launcher.returncode == 1
    assert message == f"stage second is paused at step {step}; run the same command to resume it\n"
    assert states(tmp_path) == ["complete", "paused", "to do", "to do"]
    assert status(tmp_path, TABLE)[1].detail == f"at step {step}"
    # A leftover stop file has no effect.
    (folder / "stop").touch()
    with run_launcher(tmp_path, plan) as launcher:
        launcher.communicate(timeout=60)
    assert launcher.returncode == 0
    assert states(tmp_path) == ["complete"] * 4


def test_an_attempt_that_fails_after_a_pause_is_a_failure(tmp_path: Path) -> None:
    with run_launcher(tmp_path, {"second": "steps 60"}) as launcher:
        wait_for(tmp_path, "second")
        (next(tmp_path.glob("second*")) / "stop").touch()
        launcher.communicate(timeout=60)
    with run_launcher(tmp_path, {"second": "fault"}) as launcher:
        launcher.communicate(timeout=60)
    second = status(tmp_path, TABLE)[1]
    assert (second.state, second.cause) == (
        "failed",
        "1 fault in the configuration:\n  - distill.lr=9 is too high; set 1",
    )


def test_a_sweep_and_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in "01":
        with run_launcher(tmp_path / number, {}, "--until", "first") as launcher:
            launcher.communicate(timeout=60)
    assert main([str(tmp_path)], TABLE) == 0
    message = capsys.readouterr().out
    assert message.count("complete") == 2
    assert f"{tmp_path}/1\n" in message
    for arguments in ([], ["--verify"], ["--remove-old"]):
        assert main([str(tmp_path / "nowhere"), *arguments], TABLE) == 2
        assert capsys.readouterr().err.startswith(f"error: RUN_DIR={tmp_path}/nowhere: does not exist; ")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")], TABLE) == 2
    assert "empty: contains no resolved.yaml; " in capsys.readouterr().err


def test_a_stage_that_is_complete_for_other_settings_has_not_failed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    cfg = compose(["experiment=demo", f"run_dir={run_dir}"])
    save_resolved(cfg, run_dir / RESOLVED)
    report = locate(cfg)["report"]
    report.folder.mkdir()
    (report.folder / LOG).write_text("--- 2026-11-28 10:00:00 +0000 python -m recipes report\n")
    write_manifest(report, 1.0, 4e9, {})
    changed = compose(["experiment=demo", f"run_dir={run_dir}", "distill.lr=5e-4"])
    save_resolved(changed, run_dir / RESOLVED)
    (found,) = [stage for stage in status(run_dir) if stage.stage == "report"]
    assert (found.state, found.detail) == ("to do", "complete for other settings")
    # An attempt after it that left no manifest of its own has failed.
    write_manifest(report, 1.0, 2.0, {})
    (found,) = [stage for stage in status(run_dir) if stage.stage == "report"]
    assert found.state == "failed"
