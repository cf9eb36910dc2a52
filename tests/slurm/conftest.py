"""A cluster for all tests, and runs of fake stages on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.environment import ROOT
from launch.queue import filter_active, read_submissions
from prune_distill.pipeline.names import STATE
from tests.helpers import slurm_cluster
from tests.helpers.fake_stage import PLAN

SITE = {
    "cluster": "slurm",
    "cluster.devices_per_node": 1,
    "cluster.time_limit": "0:03:00",
    "cluster.run_dir_is_shared": "true",
    "cluster.slurm.partition": "main",
    "cluster.slurm.account": "null",
    "cluster.slurm.container_image": "null",
    "cluster.slurm.gpu_request": "none",
    "cluster.slurm.warn_seconds": 60,
    "cluster.slurm.secrets": f"[{PLAN}]",
}
# Further options of sbatch, which overrule those that the config is checked for. Slurm looks twice a minute which jobs
# are to be warned, and warns up to 30 s early: here 10 to 40 s after a job's start. Not earlier, as a signal to a job
# whose script has not begun is lost.
WARNED_EARLY = "['--time=0:02:00','--signal=B:USR1@80']"
# Timeout in seconds, also for a busy machine.
PATIENCE = 300


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    lacks = slurm_cluster.missing()
    if lacks is not None:
        pytest.skip(f"no Slurm cluster can be started here: {lacks}")
    # The path of a socket is limited to 107 bytes, and pytest's folders are long.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder,
        slurm_cluster.cluster(Path(folder)) as config,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("SLURM_CONF", str(config))
        yield config


class Chain:
    """A run of fake stages, submitted by `launch.run` in a separate process."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def launch(
        self, plan: dict[str, str], *arguments: str, mode: str = "launch", path: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the launcher with `path` first on its PATH; return its exit status and output."""
        site = [f"{key}={value}" for key, value in SITE.items()]
        run_dir = str(self.run_dir).replace('"', r"\"")
        command = [sys.executable, "-m", "tests.helpers.fake_stage", mode, "experiment=demo", f'run_dir="{run_dir}"']
        env = {**os.environ, PLAN: json.dumps(plan), "PYTHONPATH": str(ROOT)}
        if path is not None:
            env["PATH"] = f"{path}:{env['PATH']}"
        return subprocess.run([*command, *site, *arguments], env=env, capture_output=True, text=True, timeout=PATIENCE)

    def submit(self, plan: dict[str, str], *arguments: str, mode: str = "launch") -> None:
        done = self.launch(plan, *arguments, mode=mode)
        assert done.returncode == 0, done.stderr

    def jobs(self, stage: str) -> list[str]:
        return list(read_submissions(self.run_dir)[stage]["jobs"])

    def folder(self, stage: str) -> Path:
        (found,) = self.run_dir.glob(f"{stage}*")
        return found

    def log(self, stage: str) -> str:
        path = self.folder(stage) / "log.txt"
        return path.read_text() if path.exists() else ""

    def state(self, stage: str) -> dict[str, object]:
        path = self.folder(stage) / STATE
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def complete(self) -> set[str]:
        return {path.parent.name.partition("-")[0] for path in self.run_dir.glob("*/manifest.json")}

    def wait(self, holds: Callable[[], object], seconds: float = PATIENCE) -> None:
        until = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < until, self.report()
            time.sleep(0.2)

    def wait_until_ended(self, seconds: float = PATIENCE) -> None:
        """Wait until all jobs have ended; Slurm must have known them."""
        ids = [job for entry in read_submissions(self.run_dir).values() for job in entry["jobs"]]
        self.wait(lambda: not filter_active(ids), seconds)

    def status(self, mode: str = "status") -> dict[str, dict[str, Any]]:
        """Return the output of `launch.status --json` by stage."""
        command = [sys.executable, "-m", "tests.helpers.fake_stage", mode, str(self.run_dir), "--json"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=PATIENCE)
        return {stage["stage"]: stage for stage in json.loads(done.stdout)[str(self.run_dir)]}

    def report(self) -> str:
        """Return information for debugging a failed test."""
        queue = subprocess.run(["squeue", "--states=all", "--format=%i %j %T %r"], capture_output=True, text=True)
        logs = [f"{path}:\n{path.read_text()[-3000:]}" for path in sorted(self.run_dir.glob("*/log.txt"))]
        return "\n".join([queue.stdout, *logs])


@pytest.fixture
def chain(cluster: Path, tmp_path: Path) -> Chain:
    return Chain(tmp_path / "run")


def slurm(*command: str) -> str:
    """The output of one of Slurm's commands."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout
