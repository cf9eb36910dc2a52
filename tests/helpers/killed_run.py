"""A tiny distillation that is killed with SIGKILL after its first checkpoint, and run again."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import tiny


@dataclass(frozen=True)
class Resumed:
    """The losses of a distillation that was killed.

    Attributes:
        step: that of the checkpoint from which it resumed.
        losses: of every step, those before the kill included.
    """

    step: int
    losses: list[float]


def kill_and_resume(run_dir: Path, *more: str) -> Resumed:
    """Kill the distillation of a tiny run whose earlier stages are complete, and run it again to its end."""
    folder = tiny.stages(run_dir, *more)["distill"].folder
    launcher = subprocess.Popen(
        tiny.command(run_dir, *more, "--until", "distill"),
        env=tiny.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        tiny.wait_for_checkpoint(folder, launcher)
    finally:
        # The stage first: it ends with its launcher, but by SIGTERM.
        for pid in [*find_stage_processes(run_dir), launcher.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()
    assert not (folder / "manifest.json").exists(), "the distillation had ended before it was killed"
    tiny.launch(run_dir, *more, "--until", "distill")
    log = (folder / "log.txt").read_text()
    (step,) = [
        int(line.rpartition("step=")[2]) for line in log.splitlines() if "training from " in line and "step=" in line
    ]
    return Resumed(step, tiny.losses(folder))


def find_stage_processes(run_dir: Path) -> list[int]:
    """Return the pids of the running stages of a run: those whose command line names its resolved config."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "recipes" in words and str(run_dir / "resolved.yaml") in words:
                found.append(int(process.name))
    return found
