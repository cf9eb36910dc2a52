"""Damage to every kind of file in a run, in every way: no stage starts from it, and the error names the reason."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from prune_distill.pipeline.artifact import Located
from tests.helpers import corruption, tiny, tolerance


def test_damage_is_never_used_silently(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, ignore=shutil.ignore_patterns(".lock"))
    tried, silent = corruption.find_silent_uses(tiny.stages(run_dir, *tiny.DEPTH), tmp_path / "aside")
    assert silent == []
    # Every stage but the first reads weights, tokens, scores, metrics or a model of another.
    assert tried > 500


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return tiny.copy_run(finished, tmp_path / "run")


def stage(run_dir: Path, name: str) -> Located:
    return tiny.stages(run_dir, *tiny.DEPTH)[name]


def test_a_hole_in_weights_is_rejected_even_if_only_sizes_are_compared(run_dir: Path) -> None:
    made, reader = stage(run_dir, "hf_to_nemo"), stage(run_dir, "prune")
    shutil.rmtree(reader.folder)
    corruption.hole(made.folder / "nemo/weights/__0_0.distcp")
    refused = tiny.launch(run_dir, *tiny.DEPTH, "--until", "prune", check=False)
    assert refused.returncode == 2
    (message,) = [line for line in refused.stderr.splitlines() if "damaged" in line]
    assert f"{made.folder} is damaged: nemo/weights/__0_0.distcp has other content than was written" in message
    assert f"rm -r {made.folder} && python -m launch.run experiment=demo run_dir={run_dir}" in message
    assert not (reader.folder / "nemo").exists()
    # The CRCs of a NeMo checkpoint are checked nevertheless.
    unverified = tiny.launch(run_dir, *tiny.DEPTH, "verify_inputs=false", "--until", "prune", check=False)
    assert unverified.returncode == 2
    assert "other content than was written" not in unverified.stderr
    assert re.search(r"is damaged: the CRC-32 of \S+ does not match", unverified.stderr), unverified.stderr[-2000:]
    assert not (reader.folder / "nemo").exists()


def test_an_export_without_its_config_is_not_complete(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, ignore=shutil.ignore_patterns(".lock"))
    exported = stage(run_dir, "nemo_to_hf").folder
    (exported / "student" / "config.json").unlink()
    refused = tiny.launch(run_dir, *tiny.DEPTH, check=False)
    assert refused.returncode == 2
    assert f"{exported} is damaged: student/config.json is missing" in refused.stderr
    assert "Traceback" not in refused.stderr
    # The command that the message names.
    shutil.rmtree(exported)
    done = tiny.launch(run_dir, *tiny.DEPTH)
    assert "nemo_to_hf: done" in done.stdout
    assert (exported / "student" / "config.json").exists()


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_it(finished: Path, tmp_path: Path) -> None:
    two = (*tiny.DEPTH, "distill.keep_checkpoints=2")
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    tiny.launch(run_dir, *two, "--until", "distill")
    folder = stage(run_dir, "distill").folder
    expected = tiny.losses(folder)
    # The state after a kill in the last steps, with damage by the disk.
    shutil.rmtree(folder / "nemo")
    (folder / "manifest.json").unlink()
    checkpoints = folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step=2", "step=4"]
    corruption.hole(checkpoints / "step=4" / "weights" / "__0_0.distcp")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\0\0\0\n{"step": 5, "lo')
    ranks = ("cluster.devices_per_node=2",)
    tiny.launch(run_dir, *two, *ranks, "--until", "distill")
    log = (folder / "log.txt").read_text()
    assert "step=4 is damaged: weights/__0_0.distcp has other content than was written" in log
    assert f"training from {checkpoints}/step=2" in log
    assert "lines removed" in log
    assert tiny.losses(folder) == pytest.approx(expected, abs=tolerance.LOSS)
    assert sorted(path.name for path in checkpoints.iterdir()) == [".damaged.step=4", "step=2", "step=4"]
