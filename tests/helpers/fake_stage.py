"""Stages without models for tests of the pipeline, started, logged and completed like real ones.

What each does is in the environment: FAKE_STAGES={"second": "fail"}; the default is to succeed. `steps N` is a training
of N steps that obeys the stop file, as `prune_distill.training.stop_file` does, and saves after every tenth; `late N`
is one that takes 3 s to start, `lead N` one of several ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from prune_distill.config.load import load_resolved
from prune_distill.config.values import count_ranks
from prune_distill.pipeline.artifact import locate, read_state, write_json, write_manifest
from prune_distill.pipeline.metrics_file import MetricsFile, read_metrics
from prune_distill.pipeline.names import STATE, STOP
from prune_distill.pipeline.processes import exit_with_torchrun
from prune_distill.pipeline.stage import Output, Source, Stage

PLAN = "FAKE_STAGES"
MODULE = "tests.helpers.fake_stage"
SECONDS_A_STEP = 0.05
STEPS_A_SAVE = 10


def _after(*names: str) -> dict[str, Source]:
    return {name: Output(name) for name in names}


TABLE = (
    Stage("first", MODULE, ("data",), lambda cfg: {}, runner=MODULE),
    Stage("second", MODULE, ("distill",), lambda cfg: _after("first"), trains=True, runner=MODULE),
    Stage("aside", MODULE, ("prune",), lambda cfg: _after("first"), runner=MODULE),
    Stage("report", MODULE, ("name",), lambda cfg: _after("first", "second", "aside"), folder="report", runner=MODULE),
)
DISTRIBUTED = (Stage("ranks", MODULE, ("data",), lambda cfg: {}, count_ranks, trains=True, runner=MODULE),)


def _act(action: str, folder: Path) -> None:
    """Perform an action; return if the stage succeeds."""
    if action == "fail":
        print("about to divide", flush=True)
        raise ZeroDivisionError("nothing by nothing")
    if action == "fault":
        print("Loading ...\nerror: 1 fault in the configuration:\n  - distill.lr=9 is too high; set 1", file=sys.stderr)
        sys.exit(2)
    if action == "half":
        (folder / "manifest.json").write_text('{"stage": "second", "stat')
        os._exit(0)
    if action == "train":
        line = {"step": 40, "max_steps": 150, "loss": 2.5, "tokens_per_second": 1234.5, "seconds_left": 75.0}
        (folder / "metrics.jsonl").write_text(
            json.dumps(line) + "\n" + json.dumps({"step": 40, "val_loss": 3.25}) + "\n"
        )
        time.sleep(1.5)
    kind, _, steps = action.partition(" ")
    if kind == "late":
        time.sleep(3)
    if kind in ("steps", "late"):
        _train(int(steps), folder)
    if action == "stuck":
        write_json(folder / STATE, {"state": "paused", "step": 0})
        sys.exit(0)
    if kind == "lead":
        _lead(int(steps), folder)
    if action == "join":
        _join(folder)
    if action == "sleep":
        time.sleep(120)
    if action == "die_on_rank_1":
        if os.environ["RANK"] == "1":
            while not (folder / "pid-0").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(120)


def _train(steps: int, folder: Path) -> None:
    """Run a training; exit the process when it pauses."""
    metrics, checkpoints = MetricsFile(folder / "metrics.jsonl"), folder / "checkpoints"
    step = max((int(path.name.removeprefix("step=")) for path in checkpoints.glob("step=*")), default=0)
    metrics.truncate_after(step)
    while step < steps:
        time.sleep(SECONDS_A_STEP)
        step += 1
        metrics.append(step=step, max_steps=steps, loss=10 / step)
        pause = (folder / STOP).exists() and step < steps
        if pause or step % STEPS_A_SAVE == 0:
            (checkpoints / f"step={step}").mkdir(parents=True, exist_ok=True)
        if pause:
            write_json(folder / STATE, {"state": "paused", "step": step})
            (folder / STOP).unlink()
            sys.exit(0)
    assert [line["step"] for line in read_metrics(metrics.path)] == list(range(1, steps + 1))
    write_json(folder / STATE, {"state": "done", "step": steps})


def _lead(steps: int, folder: Path) -> None:
    """Run a training whose other ranks wait for the first."""
    if os.environ["RANK"] == "0":
        _train(steps, folder)
    while read_state(folder).get("state") != "done":
        time.sleep(SECONDS_A_STEP)


def _join(folder: Path) -> None:
    """The sum of all ranks' numbers over gloo, written by each."""
    import torch

    torch.distributed.init_process_group("gloo")
    total = torch.tensor(torch.distributed.get_rank())
    torch.distributed.all_reduce(total)
    joined = {
        "total": int(total),
        "node": os.environ.get("SLURMD_NODENAME"),
        "world": torch.distributed.get_world_size(),
    }
    write_json(folder / f"joined-{torch.distributed.get_rank()}.json", joined)
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("--config", type=Path)
    args = parser.parse_args()
    exit_with_torchrun()
    table = DISTRIBUTED if args.stage == "ranks" else TABLE
    located = locate(load_resolved(args.config), table)[args.stage]
    rank = os.environ.get("RANK", "0")
    with (args.config.parent / "calls.txt").open("a") as calls:
        calls.write(f"{args.stage}\n")
    write_json(located.folder / f"pid-{rank}", os.getpid())
    print(f"threads {os.environ['OMP_NUM_THREADS']}", flush=True)
    started = time.time()
    action = json.loads(os.environ.get(PLAN, "{}")).get(args.stage, "succeed")
    _act(action, located.folder)
    if action != "no_manifest" and rank == "0":
        (located.folder / "result.txt").write_text("whole")
        write_manifest(located, started, time.time(), {})


def command_line() -> int:
    """`launch.run` and `launch.status` over the fake tables: `python -m tests.helpers.fake_stage launch ARGUMENTS`, or
    launch_ranks, launch_talkative (tells how things stand as often as it looks), status, status_ranks."""
    # Not at the top: a stage's process has no need of them.
    from launch import progress, run, status

    _, mode, *arguments = sys.argv
    table = DISTRIBUTED if mode.endswith("_ranks") else TABLE
    if mode.endswith("_talkative"):
        progress.SECONDS_BETWEEN_LINES = 0
    return (run if mode.startswith("launch") else status).main(arguments, table)


if __name__ == "__main__":
    if sys.argv[1].startswith(("launch", "status")):
        sys.exit(command_line())
    main()
