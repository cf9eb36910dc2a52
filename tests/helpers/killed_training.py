"""python -m tests.helpers.killed_training --config RESOLVED --seed N --times N: a repeatedly killed distillation.

NeMo is imported once; each attempt is a fork of this process, killed with SIGKILL at a random moment, perhaps within
a save. The last attempt is not killed. Prints the step from which each attempt resumed, and at which it was killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
import traceback
from contextlib import suppress
from pathlib import Path

from prune_distill.config.load import load_resolved
from prune_distill.pipeline.artifact import Located, locate, write_manifest
from prune_distill.pipeline.metrics_file import read_metrics
from prune_distill.pipeline.run_arguments import fill_inputs, view_config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--times", type=int, required=True)
    arguments = parser.parse_args()
    stage = locate(load_resolved(arguments.config))["distill"]
    stage.folder.mkdir(exist_ok=True)
    from prune_distill.nemo import backend

    backend.activate()
    from recipes import distill  # noqa: F401 (once, before the attempts are forked)

    chance = random.Random(arguments.seed)
    targets = sorted(chance.choices(range(1, stage.cfg.distill.max_steps), k=arguments.times))
    groups = [_killed_attempt(stage, target, chance.random() * 0.3) for target in targets]
    groups.append(_attempt(stage))
    _, status = os.waitpid(groups[-1], 0)
    for group in groups:
        # Processes that outlive the rank: its checkpoint writer, and torch's queue for its results.
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    raise SystemExit(os.waitstatus_to_exitcode(status))


def _attempt(stage: Located) -> int:
    child = os.fork()
    if child:
        return child
    os.setsid()
    from recipes import distill

    os.environ["SLURM_JOB_NAME"] = "interactive"  # as prune_distill.pipeline.stage_main does
    cfg, inputs = view_config(stage.cfg, stage.stage), fill_inputs(distill.Inputs, stage.inputs)
    try:
        write_manifest(stage, 0.0, 0.0, distill.run(cfg, inputs, stage.folder))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _killed_attempt(stage: Located, target: int, wait: float) -> int:
    """Kill an attempt `wait` seconds after step `target`, or after its own first step; return its process group."""
    from prune_distill.training.checkpoints import newest_checkpoint

    newest = newest_checkpoint(stage.folder / "checkpoints")
    first = int(newest.name[5:]) if newest else 0
    target = max(target, first + 1)
    began = time.time()
    child = _attempt(stage)
    metrics = stage.folder / "metrics.jsonl"
    while not _reached(metrics, began, target):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the training ended by itself"
        time.sleep(0.005)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(f"resumed from {first}, killed after step {read_metrics(metrics)[-1]['step']}", flush=True)
    return child


def _reached(metrics: Path, began: float, step: int) -> bool:
    # An older file belongs to an earlier attempt; the new one has no lines of repeated steps.
    fresh = metrics.exists() and metrics.stat().st_mtime > began
    lines = read_metrics(metrics) if fresh else []
    return any(line["step"] >= step and "loss" in line for line in lines[-3:])


if __name__ == "__main__":
    main()
