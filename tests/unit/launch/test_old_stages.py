"""Stages of earlier settings in a run's folder."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from launch import queue
from launch.planning.automatic import compose
from launch.status import main
from prune_distill.config.load import save_resolved
from prune_distill.pipeline.artifact import Located, locate, write_json, write_manifest
from prune_distill.pipeline.names import LOCK, RESOLVED
from prune_distill.pipeline.stage import External, Stage
from tests.helpers.fake_stage import TABLE


def launch(run_dir: Path, *overrides: str, stages: tuple[Stage, ...] = TABLE) -> dict[str, Located]:
    """Leave a run folder as a complete run does."""
    cfg = compose(["experiment=demo", f"run_dir={run_dir}", *overrides])
    save_resolved(cfg, run_dir / RESOLVED)
    located = locate(cfg, stages)
    for stage in located.values():
        stage.folder.mkdir(exist_ok=True)
        (stage.folder / "result.txt").write_text("x" * 1000)
        write_manifest(stage, 1.0, 2.0, {})
    return located


def names(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir() if path.is_dir()}


def test_they_are_listed_and_removed_on_request_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = launch(tmp_path, "distill.lr=9e-4")["second"].folder
    # Neither is a stage of the table.
    for name in ("notes-0123abcd", "my_data"):
        (tmp_path / name).mkdir()
    kept = {stage.folder.name for stage in launch(tmp_path).values()} | {"notes-0123abcd", "my_data"}
    assert names(tmp_path) == kept | {old.name}
    assert main([str(tmp_path)], TABLE) == 0
    listed = capsys.readouterr().out.partition("of earlier settings (--remove-old removes them):\n")[2]
    assert listed.split()[0] == old.name
    assert len(listed.splitlines()) == 1
    assert old.is_dir()
    assert main([str(tmp_path), "--remove-old"], TABLE) == 0
    assert f"removed {old} (0.000 GiB)" in capsys.readouterr().out
    assert names(tmp_path) == kept
    assert main([str(tmp_path)], TABLE) == 0
    assert "earlier settings" not in capsys.readouterr().out


def refused(run_dir: Path, old: Path, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir), "--remove-old"], TABLE) == 2
    assert reason in capsys.readouterr().err
    assert (old / "result.txt").is_file()


def test_nothing_is_removed_while_the_run_is_incomplete_or_in_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = launch(tmp_path, "distill.lr=9e-4")["second"].folder
    new = launch(tmp_path)["second"]
    (new.folder / "manifest.json").unlink()
    refused(tmp_path, old, ": second; complete the run first", capsys)
    write_manifest(new, 1.0, 2.0, {})
    (new.folder / "result.txt").write_text("damaged")
    refused(tmp_path, old, ": second; complete the run first", capsys)
    write_manifest(new, 1.0, 2.0, {})
    for folder, reason in ((tmp_path, "run_dir="), (old, f"a process uses {old}")):
        with (folder / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write('{"pid": 1, "host": "elsewhere"}')
            file.flush()
            refused(tmp_path, old, reason, capsys)
    write_json(tmp_path / "slurm" / "jobs.json", {"second": {"jobs": ["7"], "script": "second.sh"}})
    monkeypatch.setattr(queue, "query_jobs", lambda ids: {"7": queue.Queued("7", "PENDING", "Dependency", "1:00")})
    refused(tmp_path, old, "jobs 7 use ", capsys)


def test_a_folder_that_the_config_reads_is_none_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = launch(tmp_path, "distill.lr=9e-4")["second"].folder
    source = External((str(old / "result.txt"),))
    reader = Stage("reader", TABLE[0].module, ("data",), lambda cfg: {"documents": source})
    launch(tmp_path, stages=(*TABLE, reader))
    assert main([str(tmp_path), "--remove-old"], (*TABLE, reader)) == 0
    assert (old / "result.txt").is_file()
    assert capsys.readouterr().out == ""
