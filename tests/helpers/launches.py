"""Launchers over the fake stages, as processes that can be interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.local import ROOT
from tests.helpers.fake_stage import PLAN


@contextmanager
def run_launcher(
    run_dir: Path, plan: dict[str, str], *arguments: str, mode: str = "launch"
) -> Iterator[subprocess.Popen[str]]:
    """Run a launcher during the block; at the end it is killed with its stages, if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.fake_stage", mode, "experiment=demo", f"run_dir={run_dir}", *arguments],
        env={**os.environ, PLAN: json.dumps(plan), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(run_dir: Path, stage: str, rank: int = 0) -> int:
    """Wait until a stage's rank runs; return its pid."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for path in run_dir.glob(f"{stage}*/pid-{rank}"):
            return int(path.read_text())
        time.sleep(0.05)
    raise TimeoutError(f"{stage} did not start")


def wait_for_exit(pid: int, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_running(pid)


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def find_parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
