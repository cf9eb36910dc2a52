"""Write the records of a launch to the run folder: config, plan, command, and a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from launch.environment import ROOT
from launch.planning.output import to_json
from launch.planning.plan import Plan
from prune_distill.config.load import save_resolved
from prune_distill.pipeline.artifact import remember_inputs, write_json
from prune_distill.pipeline.names import LAUNCHES, PLAN, RESOLVED
from prune_distill.schema import RunConfig

SECONDS_FOR_A_REPORT = 120.0


def write_records(cfg: RunConfig, plan: Plan, command: str) -> None:
    """Write the config (`resolved.yaml`) and the plan (`plan.json`) of a run, and record the command."""
    run_dir = Path(cfg.run_dir)
    save_resolved(cfg, run_dir / RESOLVED)
    write_json(run_dir / PLAN, to_json(plan))
    remember_inputs(run_dir)
    with (run_dir / LAUNCHES).open("a") as file:
        file.write(json.dumps({"time": time.time(), "command": command}) + "\n")


def write_interim_report(run_dir: Path) -> None:
    """Write the report of an incomplete run. On failure, print the reason and do not raise, because the run's error
    matters more."""
    command = [sys.executable, "-m", "recipes.report", str(run_dir)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        env = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS_FOR_A_REPORT)
        message = done.stdout if done.returncode == 0 else f"cannot write the report: {done.stderr[-500:]}"
    except (OSError, subprocess.SubprocessError) as error:
        message = f"cannot write the report: {error}"
    print(message.strip(), flush=True)
