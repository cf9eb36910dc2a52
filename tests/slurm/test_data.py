"""Data preparation as a job array: tasks on two nodes share the shards, and take over those of one that was killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tiny
from tests.helpers.data_runs import command, folder_of, model_folder, texts, write
from tests.slurm.conftest import PATIENCE, SITE, Chain, slurm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def submit(model: Path, run_dir: Path, *more: str) -> list[str]:
    """Submit the data stage; return the command line."""
    site = {**SITE, "cluster.slurm.secrets": "[]", "cluster.time_limit": "'0:05:00'"}
    arguments = command(model, run_dir, *(f"{key}={value}" for key, value in site.items()), *more)
    done = subprocess.run(arguments, env=tiny.environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return arguments


def check(folder: Path) -> str:
    stage = [sys.executable, "-m", "recipes.prepare_data", "--check", str(folder)]
    return subprocess.run(stage, env=tiny.environment(), capture_output=True, text=True, timeout=PATIENCE).stdout


def status(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What `launch.status --json` says of each stage."""
    asked = [sys.executable, "-m", "launch.status", str(run_dir), "--json"]
    done = subprocess.run(asked, env=tiny.environment(), capture_output=True, text=True, check=True, timeout=PATIENCE)
    return {stage["stage"]: stage for stage in json.loads(done.stdout)[str(run_dir)]}


def _at_work(folder: Path) -> list[Path]:
    """The logs of the tasks that have started on their shards."""
    return [log for log in folder.glob("log*.txt") if "worker processes" in log.read_text()]


def test_array_tasks_share_the_shards_and_declare_them_once(cluster: Path, model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(60_000))
    more = (f"data.train=[{source}]", "data.shard_bytes=400000", "data.array_tasks=3", "data.num_workers=1")
    arguments = submit(model, tmp_path / "run", *more)
    chain = Chain(tmp_path / "run")
    (job,) = chain.jobs("prepare_data")
    script = (tmp_path / "run" / "slurm" / "01-prepare_data.sbatch").read_text()
    assert "#SBATCH --array=0-2\n" in script
    begun = chain.folder("prepare_data")
    chain.wait(lambda: list(begun.glob("shards/0*")) and len(_at_work(begun)) == 3)
    # One task is killed, as by a node failure: the others take over its shards.
    slurm("scancel", "--signal=KILL", "--full", f"{job}_1")
    # The others may already be complete.
    assert status(tmp_path / "run")["prepare_data"]["state"] in ("running", "complete")
    chain.wait_until_ended()
    folder = folder_of(arguments)
    assert (folder / "manifest.json").exists(), chain.report()
    assert "nothing has changed" in check(folder)
    others = (folder / "log.txt").read_text() + (folder / "log.2.txt").read_text()
    assert "paused" not in others, "what ended the second task ended another one too"
    content = json.loads((folder / "data.json").read_text())
    assert content["lines"]["documents"] == 60_000
    # The same as one process makes.
    alone = command(model, tmp_path / "alone", *more)
    subprocess.run(alone, env=tiny.environment(), check=True, capture_output=True, timeout=PATIENCE)
    for part in content["train"]:
        for suffix in (".bin", ".idx"):
            name = f"{part['prefix']}{suffix}"
            assert (folder / name).read_bytes() == (folder_of(alone) / name).read_bytes()
